"""bench.accuracy: what its cells say, and that it sees what is wrong."""

import pytest
import torch
from torch import Tensor

import bench.accuracy as accuracy
from bench.accuracy import NO_GRADIENT, SPECTRA, Cell, batch, fault, filters, measure, report
from rdm_fast import FilterConfig

pytestmark = pytest.mark.filterwarnings("ignore:filter.location")

EIGH = FilterConfig(engine="eigh")


def cell(spectrum: str, config: FilterConfig = EIGH) -> Cell:
    return measure(config, spectrum, *batch(spectrum, 12, 20, torch.float32), "cpu")


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_what_is_exact_has_no_fault(spectrum: str) -> None:
    found = cell(spectrum)
    assert not fault(EIGH, spectrum, found)
    assert (found.text == "0") == (spectrum in NO_GRADIENT)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("view", [0, 1])
def test_a_gradient_that_is_wrong_in_one_view_is_a_fault(
    view: int, spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = accuracy.gradients

    def wrong(*args) -> tuple[Tensor, ...]:
        loss, *grads = right(*args)
        grads[view] = grads[view] + 0.05 * grads[view].norm() * torch.randn(12, 20) + 1e-3
        return loss, *grads

    monkeypatch.setattr(accuracy, "gradients", wrong)
    assert "over" in fault(EIGH, spectrum, cell(spectrum))


def test_nan_of_finite_inputs_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    right = accuracy.gradients

    def wrong(*args) -> tuple[Tensor, ...]:
        loss, *grads = right(*args)
        grads[1][3, 4] = torch.nan
        return loss, *grads

    monkeypatch.setattr(accuracy, "gradients", wrong)
    found = cell("flat")
    assert found.text == "NaN" and "not finite" in fault(EIGH, "flat", found)


def test_the_table_holds_every_filter_and_spectrum_once() -> None:
    done = report("eigh", "float32", (8, 12), "cpu")
    assert not done.faults
    header, _, *rows = [line for line in done.markdown.splitlines() if line.startswith("|")]
    assert [name.strip() for name in header.split("|")[2:-2]] == SPECTRA
    assert [row.split("|")[1].strip() for row in rows] == list(filters())
    assert {row.count("|") for row in rows} == {len(SPECTRA) + 3}
