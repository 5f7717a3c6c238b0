"""split_views: each view's matrix function on one rank, and what the others get."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.filters.engines import eigh as eigh_module
from rdm_fast.filters.engines import gemm, split_views
from rdm_fast.filters.loss import SpectralCosine, SpectralPredictor, spectral_loss
from rdm_kernels.matrix_function import CHOLESKY_FAILED
from tests.ranks import run_ranks
from tests.spectra import gradients, two_views

CPU = torch.device("cpu")
N = 24
FILTERS = {
    "eigh": FilterConfig(kind="log_1", engine="eigh"),
    "eigh, target": FilterConfig(sigma=-1.0, location="target", engine="eigh"),
    "eigh, centered": FilterConfig(sigma=0.5, center=True, engine="eigh"),
    "gemm": FilterConfig(kind="log_1", engine="gemm"),
    "gemm in float64": FilterConfig(kind="log", engine="gemm"),
    "gemm, target": FilterConfig(sigma=-1.0, location="target", engine="gemm"),
}
SHAPES = [(N, 66), (66, N)]  # of the global batch: sample side, feature side


def _count(module: object, name: str, sizes: list[int]) -> None:
    """Note how many views every call is given."""
    function = getattr(module, name)

    def counted(G: Tensor, *args: object, **words: object) -> object:
        sizes.append(len(G))
        return function(G, *args, **words)

    setattr(module, name, counted)


def _rank_losses() -> list[list[Tensor]]:
    """Loss and gradients of every filter, shared and redundant, and the views computed for each."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes: list[int] = []
    _count(eigh_module, "eigen_of_gram", sizes)
    _count(gemm, "matrix_function", sizes)
    results = []
    for shape in SHAPES:
        whole = two_views(*shape, "k^-1/2")
        views = [z.chunk(world)[rank] for z in whole]
        for config in FILTERS.values():
            for smallest in (N, N + 1):
                split_views.SMALLEST = smallest
                results.append([*gradients(*views, config), torch.tensor(sizes.copy())])
                sizes.clear()
    return results


def test_each_rank_computes_one_view_and_has_the_bits_of_computing_both(tmp_path: Path) -> None:
    """The third rank has no view of its own."""
    names = [f"{name} {shape}" for shape in SHAPES for name in FILTERS]
    for results in run_ranks(3, _rank_losses, tmp_path=tmp_path):
        for name, shared, redundant in zip(names, results[::2], results[1::2], strict=True):
            assert shared.pop().tolist() == [1], name
            assert redundant.pop().tolist() == [2], name
            assert all(map(torch.equal, shared, redundant)), name
            assert all(t.isfinite().all() for t in shared), name


def _rank_failures() -> list[Tensor]:
    """Losses of a view that is not finite; then one whose factorization fails, on rank one only."""
    split_views.SMALLEST = N
    z1, z2 = (z.chunk(2)[dist.get_rank()] for z in two_views(N, 66, "k^-1/2"))
    bad = z2.clone()
    if dist.get_rank() == 1:
        bad[0, 0] = torch.inf
    not_finite = [gradients(z1, bad, FILTERS[name])[0] for name in ("eigh", "gemm")]
    cholesky = torch.linalg.cholesky_ex
    if dist.get_rank() == 1:
        torch.linalg.cholesky_ex = lambda A: (  # type: ignore[assignment]
            cholesky(A)[0],
            torch.ones(len(A), dtype=torch.int32),
        )
    config = FilterConfig(kind="log_1")
    criterion = SpectralCosine(config)
    selector = criterion.selector
    selector.load_state_dict({"name": "gemm", "failures": 0})
    loss, *_ = gradients(z1, z2, config, criterion=criterion)
    assert selector._pending is not None
    status = selector._pending.read().clone()
    return [*not_finite, loss, status, torch.tensor(selector.current(CPU) == "eigh")]


@pytest.mark.filterwarnings("ignore:filter.engine=gemm was not accurate")
def test_what_went_wrong_with_a_view_is_known_to_the_ranks_that_did_not_compute_it(
    tmp_path: Path,
) -> None:
    for *not_finite, loss, status, changed in run_ranks(2, _rank_failures, tmp_path=tmp_path):
        assert all(loss.isnan() for loss in not_finite)
        assert loss.isfinite()
        assert (status & CHOLESKY_FAILED).bool().tolist() == [False, True]
        assert changed


def test_one_rank_and_one_view_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_views, "SMALLEST", 1)
    sizes: list[int] = []
    monkeypatch.setattr(eigh_module, "eigen_of_gram", eigh_module.eigen_of_gram)
    _count(eigh_module, "eigen_of_gram", sizes)
    spectral_loss(*two_views(N, 66, "flat"), FILTERS["eigh"])
    SpectralPredictor(FILTERS["eigh"])(torch.randn(N, 66))
    assert sizes == [2, 1]


def test_small_matrices_are_not_worth_an_exchange() -> None:
    """The published recipes have B = 256 to 512; n is the smaller of B and D = 2048."""
    assert split_views.SMALLEST == 1024
