"""rdm_fast.filters.loss against the paper's formulas in float64 and autograd (tests/spectra.py)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from rdm_fast.config import FilterConfig
from rdm_fast.filters.decomposition import center_samples, smaller_gram
from rdm_fast.filters.engines import eigh
from rdm_fast.filters.loss import SpectralCosine, SpectralPredictor, spectral_loss
from tests.ranks import run_ranks
from tests.spectra import (
    ONLINE,
    SHAPES,
    SPECTRA,
    TARGET,
    VARIANTS,
    gradients,
    name,
    paper_loss,
    relative,
    two_views,
)

pytestmark = pytest.mark.filterwarnings("ignore:filter.location")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("config", ONLINE + TARGET + VARIANTS, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_loss_and_gradient_equal_the_paper_in_float64(
    config: FilterConfig, shape: tuple[int, int], spectrum: str
) -> None:
    """float32 rounds a gradient to 6e-8 of itself; eigenvalues are solved in float64. A batch of
    rank 1 has no gradient at all, so a few roundings of a cosine's, 1 / 2B|z_i|, are allowed."""
    z1, z2 = two_views(*shape, spectrum)
    loss, *grads = gradients(z1, z2, config)
    expected, *expected_grads = paper_loss(z1, z2, config)
    assert abs(loss - expected) <= 1e-6
    for grad, expected_grad, z in zip(grads, expected_grads, (z1, z2), strict=True):
        unit = (1 / (2 * len(z) * z.double().norm(dim=1))).norm()
        error = (grad.double() - expected_grad).norm()
        assert error <= 1e-5 * expected_grad.norm() + 3e-7 * unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", ONLINE, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_16_bit_inputs_cost_no_accuracy_before_the_gradient_is_rounded(
    config: FilterConfig, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """The op's own gradient is float32, and within 1e-3; autograd then rounds it to the dtype of
    its input, which costs at most half a unit in the last place of every element."""
    z1, z2 = two_views(*shape, "k^-1/2", dtype)
    loss, *rounded = gradients(z1, z2, config)
    expected, *expected_grads = paper_loss(z1, z2, config)
    assert abs(loss - expected) <= 1e-6
    for grad, expected_grad in zip(rounded, expected_grads, strict=True):
        assert grad.dtype == dtype
        assert relative(grad, expected_grad) <= torch.finfo(dtype).eps / 2
    exact = gradients(z1.float(), z2.float(), noise_as_cutoff(config, z1))[1:]
    for grad, expected_grad in zip(exact, expected_grads, strict=True):
        assert relative(grad, expected_grad) <= TOLERANCE[dtype]


def noise_as_cutoff(config: FilterConfig, z: torch.Tensor) -> FilterConfig:
    """The same filter on float32 copies of 16-bit projections: their noise as relative cutoff."""
    B, D = z.shape
    s_max = torch.linalg.matrix_norm(z.double(), 2)
    noise = 0.75 * torch.finfo(z.dtype).eps / 2 * z.double().square().mean().sqrt()
    noise = noise * (B**0.5 + D**0.5) / s_max
    return replace(config, cutoff=max(config.cutoff, float(noise)))


@pytest.mark.parametrize("config", ONLINE + TARGET, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_separate_targets_take_the_place_of_the_other_view(
    config: FilterConfig, shape: tuple[int, int]
) -> None:
    z1, z2 = two_views(*shape, "k^-1/2")
    t1, t2 = two_views(*shape, "flat")
    a, b = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    loss = spectral_loss(a, b, config, targets=(t1, t2))
    loss.backward()
    expected, grad1, grad2 = paper_loss(z1, z2, config, (t1, t2))
    assert abs(loss.detach() - expected) <= 1e-6
    assert relative(a.grad, grad1) <= 1e-5 and relative(b.grad, grad2) <= 1e-5


@pytest.mark.parametrize("config", [c for c in ONLINE + TARGET if c.kind != "log"], ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_engine_agrees_where_the_reference_is_well_defined(
    config: FilterConfig, shape: tuple[int, int]
) -> None:
    """All singular values are far from zero, so nothing is cut off; its SVD is in float32."""
    z1, z2 = two_views(*shape, "flat")
    loss, *grads = gradients(z1, z2, config)
    reference, *reference_grads = gradients(z1, z2, replace(config, engine="reference"))
    assert abs(loss - reference) <= 1e-5
    for grad, other in zip(grads, reference_grads, strict=True):
        assert relative(grad, other) <= 1e-4


# ---- the module, the names, the errors ---------------------------------------------------------


@pytest.mark.parametrize("config", ONLINE + TARGET + VARIANTS[2:4], ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_predictor_in_a_plain_simsiam_gives_the_gradient_of_the_fused_loss(
    config: FilterConfig, shape: tuple[int, int]
) -> None:
    z1, z2 = two_views(*shape, "k^-1/2")
    predictor = SpectralPredictor(config)
    a, b = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    if config.location == "online":
        loss = -F.cosine_similarity(predictor(a), z2).mean() / 2
        loss = loss - F.cosine_similarity(predictor(b), z1).mean() / 2
    else:
        loss = -F.cosine_similarity(a, predictor(z2)).mean() / 2
        loss = loss - F.cosine_similarity(b, predictor(z1)).mean() / 2
    loss.backward()
    fused, grad1, grad2 = gradients(z1, z2, config)
    assert abs(loss.detach() - fused) <= 1e-6
    assert relative(a.grad, grad1) <= 1e-5 and relative(b.grad, grad2) <= 1e-5


def test_predictor_keeps_the_dtype_of_its_input() -> None:
    z = two_views(16, 32, "flat", torch.bfloat16)[0]
    assert SpectralPredictor(FilterConfig())(z).dtype == torch.bfloat16


def test_the_fused_op_was_really_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a last product by the samples' side, without one by the features'."""
    taken: list[bool] = []
    original = eigh.filtered_cosine

    def counted(*args: Any) -> torch.Tensor:
        taken.append(args[6] is not None)
        return original(*args)

    monkeypatch.setattr(eigh, "filtered_cosine", counted)
    spectral_loss(*two_views(16, 32, "flat"), FilterConfig())
    spectral_loss(*two_views(32, 16, "flat"), FilterConfig())
    spectral_loss(*two_views(32, 16, "flat"), FilterConfig(engine="reference"))
    assert taken == [True, False]


def test_mismatched_branches_are_named() -> None:
    with pytest.raises(ValueError, match=r"got online torch.float32 \(2, 4, 8\) and target"):
        SpectralCosine(FilterConfig())(torch.zeros(2, 4, 8), torch.zeros(2, 4, 9))


def test_a_filter_on_the_wrong_branch_is_allowed_with_one_warning() -> None:
    config = FilterConfig(location="target", sigma=0.123)
    with pytest.warns(UserWarning, match="RDM predicts dimensional collapse"):
        SpectralPredictor(config)


# ---- several ranks -----------------------------------------------------------------------------

RANK_CONFIGS = [
    FilterConfig(),
    FilterConfig(location="target", sigma=-1.0),
    FilterConfig(location="target", sigma=-0.5, basis="online"),
    FilterConfig(center=True),
    FilterConfig(engine="reference"),
]


def _rank_gradients(shape: tuple[int, int]) -> list[torch.Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    z1, z2 = two_views(*shape, "k^-1/2")
    results = []
    for config in RANK_CONFIGS:
        rows = [z.chunk(world)[rank] for z in (z1, z2)]
        results += [*gradients(*rows, config)]
    return results


def _rank_collectives() -> list[int]:
    """Calls of each collective in forward and in backward of one SimSiam step."""
    counts = {"forward": 0, "backward": 0}
    phase = "forward"
    gather = dist.all_gather_into_tensor

    def counted(*args: object, **kwargs: object) -> object:
        counts[phase] += 1
        return gather(*args, **kwargs)

    dist.all_gather_into_tensor = counted  # type: ignore[assignment]
    for other in ("all_reduce", "all_gather", "reduce_scatter_tensor", "broadcast"):
        setattr(dist, other, None)  # anything else would fail
    z1, z2 = (z.chunk(dist.get_world_size())[dist.get_rank()] for z in two_views(24, 64, "flat"))
    loss = spectral_loss(z1.requires_grad_(), z2.requires_grad_(), FilterConfig())
    phase = "backward"
    loss.backward()
    return [counts["forward"], counts["backward"]]


def test_one_gather_forward_and_no_collective_backward(tmp_path: Path) -> None:
    """Trap 24: projections are gathered with autograd, twice a loss, which all-reduces backward."""
    assert run_ranks(2, _rank_collectives, tmp_path=tmp_path) == [[1, 0], [1, 0]]


@pytest.mark.parametrize(("world", "shape"), [(2, (24, 64)), (4, (24, 64)), (2, (64, 24))])
def test_ranks_together_have_the_gradient_of_the_global_batch(
    world: int, shape: tuple[int, int], tmp_path: Path
) -> None:
    """Each rank differentiates its own rows' mean, so its rows are `world` times the global ones,
    and the mean over ranks that data parallelism takes makes them equal."""
    ranks = run_ranks(world, _rank_gradients, shape, tmp_path=tmp_path)
    z1, z2 = two_views(*shape, "k^-1/2")
    for i, config in enumerate(RANK_CONFIGS):
        expected = gradients(z1, z2, config)
        loss = torch.stack([r[3 * i] for r in ranks]).mean()
        assert abs(loss - expected[0]) <= 1e-6
        for view in (1, 2):
            rows = torch.cat([r[3 * i + view] for r in ranks]) / world
            assert relative(rows, expected[view]) <= 1e-5


def _loss_and_gradients_with_one_bad_rank(bad: float, shape: tuple[int, int]) -> list[torch.Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    results = []
    for config in RANK_CONFIGS[:3]:
        z1, z2 = (z.chunk(world)[rank].clone() for z in two_views(*shape, "flat"))
        if rank == 0:
            z1[1, 2] = bad
        results += [*gradients(z1, z2, config)]
    return results


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)], ids=str)
def test_a_value_that_is_not_finite_on_one_rank_makes_every_rank_s_loss_nan(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    """Otherwise some ranks would skip the step and others not."""
    bad = float("nan")
    for rank in run_ranks(2, _loss_and_gradients_with_one_bad_rank, bad, shape, tmp_path=tmp_path):
        for loss, *grads in zip(rank[::3], rank[1::3], rank[2::3], strict=True):
            assert loss.isnan() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("shape", [(24, 64), (64, 64)], ids=str)
def test_centering_a_gram_matrix_is_that_of_centered_samples(shape: tuple[int, int]) -> None:
    X = two_views(*shape, "k^-1/2", torch.float64)[0][None] + 3.0
    centered = smaller_gram(X - X.mean(dim=1, keepdim=True))
    torch.testing.assert_close(center_samples(smaller_gram(X)), centered, rtol=0, atol=1e-9)
