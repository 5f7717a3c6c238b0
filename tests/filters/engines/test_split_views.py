"""engines.split_views: each rank computes the factors of one view for all."""

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rdm_fast.config import FilterConfig
from rdm_fast.filters.engines import eigh as eigh_module
from rdm_fast.filters.engines import gemm, split_views
from rdm_fast.filters.loss import SpectralCosine, SpectralPredictor
from rdm_kernels.filter_steps import INACCURATE, define_combine
from tests.ranks import run_ranks
from tests.spectra import gradients, two_views
from tests.spies import calls_of

CPU = torch.device("cpu")
N = 24
FILTERS = {
    "eigh": FilterConfig(kind="log_1", engine="eigh"),
    "eigh, target": FilterConfig(sigma=-1.0, location="target", engine="eigh"),
    "eigh, centered": FilterConfig(sigma=0.5, center=True, engine="eigh"),
    "gemm": FilterConfig(kind="log_1", engine="gemm"),
    "gemm, falling": FilterConfig(sigma=-0.5, engine="gemm"),
    "gemm, target": FilterConfig(sigma=-1.0, location="target", engine="gemm"),
}
CASES = [(shape, name) for shape in ((N, 66), (66, N)) for name in FILTERS]  # both sides


def _on_one_rank() -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    patch = pytest.MonkeyPatch()
    eigh_calls = calls_of(patch, eigh_module, "eigen_of_gram")
    gemm_calls = calls_of(patch, gemm, "filter_factors")
    found: dict[str, Any] = {"split": [], "redundant": []}
    for shape, name in CASES:
        views = [z.chunk(world)[rank] for z in two_views(*shape, "k^-1/2")]
        for how, smallest in (("split", N), ("redundant", N + 1)):
            split_views.SMALLEST = smallest
            made = gradients(*views, FILTERS[name])
            found[how].append([*made, [len(G) for G, *_ in eigh_calls + gemm_calls]])
            eigh_calls.clear()
            gemm_calls.clear()

    # A view that is not finite on rank 1; then one whose residual is large there.
    split_views.SMALLEST = N
    z1, z2 = (z.chunk(world)[rank] for z in two_views(N, 66, "k^-1/2"))
    bad = z2.clone()
    if rank == 1:
        bad[0, 0] = torch.inf
    found["not finite"] = [gradients(z1, bad, FILTERS[name])[0] for name in ("eigh", "gemm")]
    if rank == 1:
        patch.setattr(
            sys.modules["rdm_kernels.filter_factors"],
            "combine",
            lambda weights, matrices, root, residual, *rest: define_combine(
                weights, matrices, root, residual + 1, *rest
            ),
        )
    criterion = SpectralCosine(FilterConfig(kind="log_1"))
    selector = criterion.selector
    selector.load_state_dict({"name": "gemm", "failures": 0})
    found["loss"] = gradients(z1, z2, criterion.filter, criterion=criterion)[0]
    assert selector._pending is not None
    found["status"] = selector._pending.read().clone()
    found["next engine"] = selector.current(CPU)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of three ranks; the third has no view of its own."""
    return run_ranks(3, _on_one_rank, tmp_path=tmp_path_factory.mktemp("ranks"))


def test_each_rank_computes_one_view_and_has_the_bits_of_both(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for case, split, redundant in zip(CASES, found["split"], found["redundant"], strict=True):
            assert (split.pop(), redundant.pop()) == ([1], [2]), case
            assert all(map(torch.equal, split, redundant)), case
            assert all(t.isfinite().all() for t in split), case


def test_every_rank_learns_what_failed_on_another(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert all(loss.isnan() for loss in found["not finite"])
        assert found["loss"].isfinite() and found["next engine"] == "eigh"
        assert (found["status"] & INACCURATE).bool().tolist() == [False, True]


def test_one_rank_or_one_view_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_views.SMALLEST == 1024  # the published recipes have n <= 512
    monkeypatch.setattr(split_views, "SMALLEST", 1)
    calls = calls_of(monkeypatch, eigh_module, "eigen_of_gram")
    gradients(*two_views(N, 66, "flat"), FILTERS["eigh"])
    SpectralPredictor(FILTERS["eigh"])(torch.randn(N, 66))
    assert [len(G) for G, *_ in calls] == [2, 1]
