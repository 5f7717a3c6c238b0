"""bench.launches: what it counts, and that no filter launches more than it may."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from bench.counting import HOST_LAUNCH, HOST_OP, LATENCY, PER_COLUMN, Count, counting, flops
from bench.fake_device import backward, fake_device
from bench.launches import filters, main, measured
from bench.markdown import between
from bench.prototypes import RECIPES
from rdm_fast import FilterConfig
from rdm_fast.filters.gram import gram_and_swapped, gram_matrix
from rdm_fast.filters.loss import SpectralCosine
from rdm_kernels import neg_cosine, safe_eigh
from tests.forks import ROOT, Forked
from tests.spectra import two_views

FEW = 60
BOUNDS = {"online s^2": 12, "target s^2": 12, "online s^-0.7": 250, "online s^-1": 250}


def forked(function: Callable[..., object], *args: object, folder: Path) -> str:
    """Output of a function in its own process: what it fakes reaches no other test."""
    process = Forked(function, *args, out=folder / "out")
    code = process.wait(timeout=600)
    text = (folder / "out").read_text()
    if code:
        raise RuntimeError(text)
    return text


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("launches")
    forked(main, ["--json", str(folder / "json")], folder=folder)
    found = json.loads((folder / "json").read_text())["rows"]
    return {row["filter"]: row for row in found}


@pytest.mark.parametrize("name", filters())
def test_a_filter_launches_no_more_than_it_may(name: str, rows: dict[str, Any]) -> None:
    row, most = rows[name], BOUNDS.get(name, FEW)
    assert 0 < row["launches"] <= most
    if most <= FEW:
        assert not row["factorizations"] and not row["waits"]


@pytest.mark.parametrize("name", RECIPES)
def test_prototypes_launch_no_more_than_they_may(name: str, rows: dict[str, Any]) -> None:
    assert 0 < rows[name]["launches"] <= 50
    assert not rows[name]["factorizations"] and not rows[name]["waits"]


# ---- the table -----------------------------------------------------------------------------------


def _write_and_check(page: Path) -> None:
    options = ["--filters", "s^2", "--shape", "64", "256"]
    page.write_text("<!-- launches: begin -->\n| target s^2 | 0.07 |\n<!-- launches: end -->\n")
    assert main([*options, "--write", str(page)]) == 0
    found = measured(between(page, "launches"))
    assert found.items() >= {"online s^2": "", "target s^2": "0.07"}.items()
    page.write_text(page.read_text().replace("0.07", "0.08"))
    assert main([*options, "--check", str(page)]) == 0
    page.write_text(re.sub(r"(online s\^2 \|) \d+", r"\1 99", page.read_text()))
    assert main([*options, "--check", str(page)]) == 1


def test_a_table_keeps_what_was_measured_and_a_wrong_one_is_noticed(tmp_path: Path) -> None:
    forked(_write_and_check, tmp_path / "page.md", folder=tmp_path)


def test_the_page_states_the_constants() -> None:
    text = (ROOT / "kernels" / "README.md").read_text("utf-8")
    for seconds in (LATENCY, HOST_LAUNCH, HOST_OP, *PER_COLUMN.values()):
        assert f"`{1e6 * seconds:g} µs`" in text


# ---- what is counted -----------------------------------------------------------------------------


def _count(work: Callable[[Tensor], object]) -> Count:
    with fake_device():
        X = torch.empty(2, 48, 64, device="cuda", requires_grad=True)
        with counting() as launches:
            work(X)
    return launches.count


def _check_counts() -> None:
    nothing = _count(lambda X: (X.mT[:, 1:].detach().flatten(1, 1).expand(2, -1, -1), X.shape))
    assert nothing == Count()

    small = _count(lambda X: (X + 1, X.isfinite(), F.pad(X, (0, 2)), X.cpu() * 3))
    assert (small.others, small.triton, small.products) == (1 + 4 + 2 + 1, 0, 0)

    product = _count(lambda X: X @ X.mT)
    assert (product.launches, product.products) == (1, 1)

    wide = _count(lambda X: gram_matrix(X, samples=True, wide=True))
    assert (wide.products, wide.others) == (1, 1)  # and a copy in float64
    stacked = _count(lambda X: gram_and_swapped(X, wide=True))
    assert (stacked.products, stacked.others) == (1, 2)  # and the blocks

    def solve(X: Tensor) -> None:
        L, _ = torch.linalg.cholesky_ex(X @ X.mT)
        torch.cholesky_solve(X, L)

    solved = _count(solve)
    assert solved.factorizations == {"linalg_cholesky_ex": 1, "cholesky_solve": 1}
    assert (solved.launches, solved.waits) == (1, 0)

    eigen = _count(lambda X: safe_eigh(X[:, :, :48]))
    assert list(eigen.factorizations.values()) == [1] and eigen.waits == 1

    ours = _count(lambda X: backward(neg_cosine(X, X.flip(0)).mean()))
    assert ours.triton == ours.operations["_neg_cosine_fwd_kernel"] + 1 == 2
    assert ours.operations["rdm::neg_cosine_backward"] == 1
    assert ours.others == 1 + 2 + 2  # flip; a mean over rows, one over views; its gradient and 1

    bodies = _count(lambda X: neg_cosine(X.double(), X.double()))
    assert bodies.triton == 0 and bodies.others > 5


def test_views_are_free_and_every_kernel_counts(tmp_path: Path) -> None:
    forked(_check_counts, folder=tmp_path)


@pytest.mark.parametrize("location", ["online", "target"])
def test_gradients_are_those_of_autograd(location: Any) -> None:
    z = torch.stack(two_views(12, 20, "k^-1")).requires_grad_()
    criterion = SpectralCosine(
        FilterConfig(location=location, sigma=-1 if location == "target" else 1)
    )
    (found,) = backward(criterion(z).mean()).values()
    (expected,) = torch.autograd.grad(criterion(z).mean(), z)
    assert_close(found, expected, rtol=0, atol=0)


def test_a_product_takes_the_rate_of_what_is_multiplied() -> None:
    def work(a: torch.dtype, b: torch.dtype, given: bool = True) -> dict[str, int]:
        A, B = torch.empty(2, 3, 5, dtype=a), torch.empty(2, 5, 7, dtype=b)
        C = torch.empty(2, 3, 7)
        op = torch.ops.aten.bmm.default
        return flops(op, (A, B), {}, C, [A, B, torch.empty(2)] if given else [])

    n = 2 * 2 * 3 * 5 * 7
    assert work(torch.bfloat16, torch.bfloat16) == {"bf16": n}
    assert work(torch.float32, torch.bfloat16) == {"bf16": 2 * n}
    assert work(torch.float32, torch.float32) == {"tf32": 3 * n}
    assert work(torch.float32, torch.float32, given=False) == {"fp32": n}
    assert work(torch.float64, torch.float64) == {"fp64": n}
    single = [torch.empty(3, 5), torch.empty(5, 7)]
    assert flops(torch.ops.aten.mm.default, single, {}, torch.empty(3, 7)) == {"fp32": n / 2}
