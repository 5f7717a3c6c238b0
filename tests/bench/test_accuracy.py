"""bench.accuracy: what its cells say, and that it notices errors."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bench.accuracy as accuracy
from bench.accuracy import NO_GRADIENT, SPECTRA, Cell, batch, fault, filters, measure, report
from rdm_fast import FilterConfig

pytestmark = pytest.mark.filterwarnings("ignore:filter.location")
EIGH = FilterConfig(engine="eigh")
Change = Callable[[list[Tensor]], None]
Install = Callable[[Change], None]


def cell(spectrum: str) -> Cell:
    return measure(EIGH, spectrum, *batch(spectrum, 12, 20, torch.float32), "cpu")


@pytest.fixture
def change_gradients(monkeypatch: pytest.MonkeyPatch) -> Install:
    right = accuracy.gradients

    def install(change: Change) -> None:
        def wrong(*args: object, **options: object) -> tuple[Tensor, ...]:
            loss, *grads = right(*args, **options)
            change(grads)
            return loss, *grads

        monkeypatch.setattr(accuracy, "gradients", wrong)

    return install


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_only_a_wrong_gradient_is_a_fault(spectrum: str, change_gradients: Install) -> None:
    found = cell(spectrum)
    assert not fault(EIGH, spectrum, found)
    assert (found.text == "0") == (spectrum in NO_GRADIENT)
    for view in (0, 1):

        def change(grads: list[Tensor], view: int = view) -> None:
            grads[view] += 0.05 * grads[view].norm() * torch.randn(12, 20) + 1e-3

        change_gradients(change)
        assert fault(EIGH, spectrum, cell(spectrum))


def test_nan_from_finite_inputs_is_a_fault(change_gradients: Install) -> None:
    change_gradients(lambda grads: grads[1][3].fill_(torch.nan))
    found = cell("flat")
    assert found.text == "NaN" and fault(EIGH, "flat", found)


def test_the_table_and_the_rows_hold_every_filter_and_spectrum_once(tmp_path: Path) -> None:
    done = report("eigh", "float32", (8, 12), "cpu", tmp_path / "rows")
    found = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(found) == len(filters()) * len(SPECTRA)
    assert all(asdict(done.cells[row["filter"]][row["spectrum"]]).items() <= row.items()
               for row in found)  # fmt: skip
    assert not done.faults
    header, _, *rows = [line for line in done.markdown.splitlines() if line.startswith("|")]
    assert [name.strip() for name in header.split("|")[2:-2]] == SPECTRA
    assert [row.split("|")[1].strip() for row in rows] == list(filters())
    assert {row.count("|") for row in rows} == {len(SPECTRA) + 3}
