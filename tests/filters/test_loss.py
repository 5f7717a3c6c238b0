"""filters.loss against the paper's formulas in float64 and autograd (tests/spectra.py)."""

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
    Shape,
    g,
    gradients,
    name,
    paper_loss,
    relative,
    two_views,
)
from tests.spies import calls_of, refused
from tests.thinned import in_turn

pytestmark = pytest.mark.filterwarnings("ignore:filter.location")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@pytest.mark.parametrize(
    ("config", "spectrum", "shape"),
    in_turn(2, ONLINE + TARGET + VARIANTS, SPECTRA, SHAPES),
    ids=name,
)
def test_it_equals_the_paper_in_float64(config: FilterConfig, spectrum: str, shape: Shape) -> None:
    """float32 rounds a gradient to 6e-8 of itself, in a weak direction k to s_1 / s_k times that.
    Eigenvalues are solved in float64. A batch of rank 1 has no gradient at all, so a few roundings
    of a cosine's, 1 / 2B|z_i|, are allowed."""
    z1, z2 = two_views(*shape, spectrum)
    weak = max(strongest_by_weakest(z1), strongest_by_weakest(z2))
    loss, *grads = gradients(z1, z2, config)
    expected, *expected_grads = paper_loss(z1, z2, config)
    assert abs(loss - expected) <= 1e-6 + 1e-10 * weak
    for grad, expected_grad, z in zip(grads, expected_grads, (z1, z2), strict=True):
        unit = (1 / (2 * len(z) * z.double().norm(dim=1))).norm()
        error = (grad.double() - expected_grad).norm()
        assert error <= (1e-5 + 1e-7 * weak) * expected_grad.norm() + 3e-7 * unit


def strongest_by_weakest(z: torch.Tensor) -> float:
    """s_1 / s_k of the weakest direction over the default cutoff; the larger one if centered."""
    spectra = [torch.linalg.svdvals(x) for x in (z.double(), z.double() - z.double().mean(dim=0))]
    return max(float(s[0] / s[s > 1e-4 * s[0]].min()) for s in spectra)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", ONLINE, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_16_bit_inputs_cost_no_accuracy_before_the_gradient_is_rounded(
    config: FilterConfig, shape: Shape, dtype: torch.dtype
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(128, 384), (384, 128)], ids=str)
@pytest.mark.parametrize("spectrum", ["k^-2", "clusters"])
def test_16_bit_inputs_are_filtered_as_exactly_as_wider_ones_near_the_cutoff(
    spectrum: str, shape: Shape, dtype: torch.dtype
) -> None:
    """Sums in float32 would leave an eigenvalue there a few percent uncertain, and the loss 3e-5.
    Gradients of clusters are too small for float16."""
    z1, z2 = two_views(*shape, spectrum, dtype)
    for config in (*TARGET[:3], *VARIANTS[:1], FilterConfig(kind="log"), FilterConfig(sigma=-1.0)):
        loss, *grads = gradients(z1, z2, config)
        expected, *expected_grads = paper_loss(z1, z2, config)
        assert abs(loss - expected) <= 1e-6
        if spectrum == "k^-2":
            for grad, expected_grad in zip(grads, expected_grads, strict=True):
                assert relative(grad, expected_grad) <= torch.finfo(dtype).eps / 2


def noise_as_cutoff(config: FilterConfig, z: torch.Tensor) -> FilterConfig:
    """The same filter on float32 copies of 16-bit projections: their noise as relative cutoff."""
    B, D = z.shape
    s_max = torch.linalg.matrix_norm(z.double(), 2)
    noise = 0.75 * torch.finfo(z.dtype).eps / 2 * z.double().square().mean().sqrt()
    noise = noise * (B**0.5 + D**0.5) / s_max
    return replace(config, cutoff=max(config.cutoff, float(noise)))


@pytest.mark.parametrize("config", ONLINE + TARGET, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_targets_replace_the_other_view(config: FilterConfig, shape: Shape) -> None:
    z1, z2 = two_views(*shape, "k^-1/2")
    targets = two_views(*shape, "flat")
    loss, *grads = gradients(z1, z2, config, targets)
    assert torch.equal(loss, spectral_loss(z1, z2, config, targets=targets))
    expected, *expected_grads = paper_loss(z1, z2, config, targets)
    assert abs(loss - expected) <= 1e-6
    assert all(relative(*pair) <= 1e-5 for pair in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("config", [c for c in ONLINE + TARGET if c.kind != "log"], ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_agrees_where_it_is_well_defined(config: FilterConfig, shape: Shape) -> None:
    """All singular values are far from zero, so nothing is cut off; its SVD is in float32."""
    z1, z2 = two_views(*shape, "flat")
    loss, *grads = gradients(z1, z2, config)
    reference, *reference_grads = gradients(z1, z2, replace(config, engine="reference"))
    assert abs(loss - reference) <= 1e-5
    assert all(relative(*pair) <= 1e-4 for pair in zip(grads, reference_grads, strict=True))


@pytest.mark.parametrize("config", ONLINE + TARGET + VARIANTS[2:4], ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_predictor_in_simsiam_has_the_fused_gradient(config: FilterConfig, shape: Shape) -> None:
    z1, z2 = two_views(*shape, "k^-1/2")
    predictor, online = SpectralPredictor(config), config.location == "online"
    a, b = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    loss = torch.zeros(())
    for p, z in ((a, z2), (b, z1)):
        y, t = (predictor(p), z) if online else (p, predictor(z))
        loss = loss - F.cosine_similarity(y, t).mean() / 2
    loss.backward()
    fused, grad1, grad2 = gradients(z1, z2, config)
    assert abs(loss.detach() - fused) <= 1e-6
    assert relative(a.grad, grad1) <= 1e-5 and relative(b.grad, grad2) <= 1e-5
    assert predictor(z1.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "engine", "shape"),
    in_turn(2, ONLINE + TARGET[2:3], ["auto", "eigh", "gemm", "reference"], SHAPES),
    ids=name,
)
def test_every_engine_has_one_scale(config: FilterConfig, engine: Any, shape: Shape) -> None:
    """(s / s_rms)^sigma, which a loss other than a cosine sees, forward and backward. gemm fits
    its functions of s."""
    z, other = (7 * z for z in two_views(*shape, "flat"))
    _, s, Vh = torch.linalg.svd(z.double(), full_matrices=False)
    s = s / s.square().mean().sqrt() if config.kind == "poly" else s
    W = (Vh.mT * g(config, s)) @ Vh
    z.requires_grad_()
    p = SpectralPredictor(replace(config, engine=engine))(z)
    (p - other).square().sum().backward()
    assert z.grad is not None
    error = 4e-3 if engine == "gemm" else 1e-5
    assert relative(p.detach(), z.detach().double() @ W) <= error
    assert relative(z.grad, 2 * (z.detach().double() @ W - other.double()) @ W) <= error


@pytest.mark.parametrize(
    ("shape", "engine", "expected"),
    [((16, 32), "auto", [True]), ((32, 16), "auto", [False]), ((32, 16), "reference", [])],
)
def test_the_fused_op_is_used(
    shape: Shape, engine: Any, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a last product on the samples' side, without one on the features'."""
    calls = calls_of(monkeypatch, eigh, "filtered_cosine")
    gradients(*two_views(*shape, "flat"), FilterConfig(engine=engine))
    assert [X is not None for *_, X in calls] == expected


@pytest.mark.parametrize("target", [(2, 4, 9), (3, 4, 8), (4, 8)], ids=str)
def test_branches_that_do_not_fit_are_refused(target: tuple[int, ...]) -> None:
    with refused(ValueError, "(2, 4, 8)", str(target)):
        SpectralCosine(FilterConfig())(torch.zeros(2, 4, 8), torch.zeros(target))


def test_a_filter_on_the_wrong_branch_warns_at_the_callers_line() -> None:
    config = FilterConfig(location="target", sigma=0.123)
    z1, z2 = two_views(8, 4, "flat")
    with pytest.warns(UserWarning) as caught:
        SpectralPredictor(config)
        spectral_loss(z1, z2, config)
    assert [warning.filename for warning in caught] == [__file__] * 2


# ---- several ranks -----------------------------------------------------------------------------

RANK_CONFIGS = [
    FilterConfig(),
    FilterConfig(location="target", sigma=-1.0),
    FilterConfig(location="target", sigma=-0.5, basis="online"),
    FilterConfig(center=True),
    FilterConfig(engine="reference"),
]
RANK_SHAPES = [(24, 64), (64, 24)]


def _on_one_rank() -> list[Any]:
    """Gradients of good batches, of batches with a NaN on rank 0, and the collectives of a step."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def mine(shape: Shape, kind: str) -> list[torch.Tensor]:
        return [z.chunk(world)[rank].clone() for z in two_views(*shape, kind)]

    good = [gradients(*mine(s, "k^-1/2"), c) for s in RANK_SHAPES for c in RANK_CONFIGS]
    bad = []
    for shape in RANK_SHAPES:
        for config in RANK_CONFIGS[:3]:
            z1, z2 = mine(shape, "flat")
            if rank == 0:
                z1[1, 2] = float("nan")
            bad.append(gradients(z1, z2, config))
    gathers = calls_of(pytest.MonkeyPatch(), dist, "all_gather_into_tensor")
    for other in ("all_reduce", "all_gather", "reduce_scatter_tensor", "broadcast"):
        setattr(dist, other, None)  # anything else would fail
    z1, z2 = mine((24, 64), "flat")
    loss = spectral_loss(z1.requires_grad_(), z2.requires_grad_(), FilterConfig())
    forward = len(gathers)
    loss.backward()
    return [good, bad, [forward, len(gathers)]]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_have_the_gradient_of_the_global_batch(world: int, tmp_path: Path) -> None:
    """Each rank differentiates its own rows' mean, so its rows are `world` times the global ones,
    and the mean over ranks that data parallelism takes makes them equal. A batch that is not finite
    on one rank is NaN on all, so that all skip the step. Trap 24: the reference gathers projections
    twice a loss, with autograd, which all-reduces backward."""
    goods, bads, gathers = zip(*run_ranks(world, _on_one_rank, tmp_path=tmp_path), strict=True)
    cases = [(shape, config) for shape in RANK_SHAPES for config in RANK_CONFIGS]
    for (shape, config), of_ranks in zip(cases, zip(*goods, strict=True), strict=True):
        expected = gradients(*two_views(*shape, "k^-1/2"), config)
        losses, *views = zip(*of_ranks, strict=True)
        assert abs(torch.stack(losses).mean() - expected[0]) <= 1e-6
        for rows, grad in zip(views, expected[1:], strict=True):
            assert relative(torch.cat(rows) / world, grad) <= 1e-5
    for loss, *grads in (each for bad in bads for each in bad):
        assert loss.isnan() and all(grad.isfinite().all() for grad in grads)
    assert list(gathers) == [[1, 1]] * world


@pytest.mark.parametrize("shape", [(24, 64), (64, 64)], ids=str)
def test_centering_a_gram_matrix_centers_the_samples(shape: Shape) -> None:
    X = two_views(*shape, "k^-1/2", torch.float64)[0][None] + 3.0
    centered = smaller_gram(X - X.mean(dim=1, keepdim=True))
    torch.testing.assert_close(center_samples(smaller_gram(X)), centered, rtol=0, atol=1e-9)
