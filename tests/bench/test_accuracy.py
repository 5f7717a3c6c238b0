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
from bench.tensor_cores import tf32x3
from rdm_fast import FilterConfig
from rdm_kernels import product

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


def test_tf32x3_changes_products_of_the_gemm_engine_and_stays_within_its_limits() -> None:
    """Each as three products of operands of 10 bits, which keep 21 bits of an element."""
    A, B = torch.randn(2, 8, 8), torch.randn(2, 8, 8)
    config = FilterConfig(sigma=1.0, engine="gemm")
    views = batch("k^-1", 12, 20, torch.float32)
    plain = measure(config, "k^-1", *views, "cpu")
    with tf32x3():
        emulated = product(A, B)
        cell = measure(config, "k^-1", *views, "cpu")
    error = (emulated.double() - A.double() @ B.double()).abs() / (A.abs() @ B.abs())
    assert 2.0**-25 < float(error.max()) < 2.0**-19
    assert torch.equal(product(A, B), A @ B)
    assert cell.error != plain.error and not fault(config, "k^-1", cell)


@pytest.mark.parametrize(("engine", "refused"), [("gemm", True), ("auto", False)])
def test_a_filter_that_an_engine_refuses_has_no_row(
    engine: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "SPECTRA", ["flat"])
    rows = report(engine, "float32", (6, 8), "cpu").cells
    assert ("online s^-1" not in rows) == refused and "online s^-0.5" in rows
