"""rdm_fast.spectral against the paper's formulas in float64 and autograd (tests/spectra.py)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from rdm_fast.config import FilterConfig
from rdm_fast.errors import Unavailable
from rdm_fast.spectral import (
    SpectralPredictor,
    centre_samples,
    gram,
    right_vectors,
    spectral_cosine,
    spectral_loss,
)
from tests.ranks import run_ranks
from tests.spectra import SPECTRA, paper_filter, paper_loss, relative, two_views

pytestmark = pytest.mark.filterwarnings("ignore:filter.location")

SHAPES = [(24, 64), (48, 48), (64, 24)]
ONLINE = [FilterConfig(sigma=s) for s in (0.5, 1.0, 2.0)] + [
    FilterConfig(kind=kind) for kind in ("log", "log_1", "log_2")
]
TARGET = [FilterConfig(location="target", sigma=s) for s in (-1.0, -0.7, -0.5, -0.3, 0.0, 1.0)]
VARIANTS = [
    FilterConfig(location="target", sigma=-0.5, basis="online"),
    FilterConfig(location="target", kind="log_1"),
    FilterConfig(sigma=1.0, center=True),
    FilterConfig(location="target", sigma=-1.0, center=True),
    FilterConfig(location="target", sigma=-0.5, basis="online", center=True),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def name(config: FilterConfig) -> str:
    flags = "-".join([config.basis] * (config.basis != "own") + ["center"] * config.center)
    return f"{config.location}-{config.kind}{config.sigma:g}{flags}"


def gradients(
    z1: torch.Tensor, z2: torch.Tensor, config: FilterConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    loss = spectral_loss(a, b, config)
    loss.backward()
    assert a.grad is not None and b.grad is not None
    return loss.detach(), a.grad, b.grad


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


# ---- where the reference is not well defined --------------------------------------------------

HARD = {
    "zero": lambda z: torch.zeros_like(z),
    "duplicated rows": lambda z: z[:1].expand_as(z).clone(),
    "one zero row": lambda z: z.index_fill(0, torch.tensor(0), 0.0),
    "centred": lambda z: z - z.mean(dim=0),
    "scale 1e4": lambda z: z * 1e4,
    "scale 1e-4": lambda z: z * 1e-4,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "config",
    [*ONLINE, *TARGET, FilterConfig(sigma=-0.5), FilterConfig(sigma=-1.0)],
    ids=name,
)
def test_gradients_are_finite_and_bounded_on_degenerate_batches(
    config: FilterConfig, dtype: torch.dtype, case: str, shape: tuple[int, int]
) -> None:
    """|dL/dp_i| |p_i| is at most (g_max / g_min kept) / 2b for a cosine of filtered rows, and
    with the default cutoff that quotient is at most 1000 for |sigma| <= 1."""
    z1, z2 = two_views(*shape, "k^-1", torch.float32)
    z1, z2 = HARD[case](z1).to(dtype), HARD[case](z2).to(dtype)
    loss, *grads = gradients(z1, z2, config)
    assert -1 - 1e-6 <= loss <= 1 + 1e-6
    for grad, z in zip(grads, (z1, z2), strict=True):
        assert grad.isfinite().all()
        nonzero = z.float().norm(dim=1) > 0
        size = (grad.float().norm(dim=1) * z.float().norm(dim=1))[nonzero]
        assert (size <= 1000 / shape[0]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", [FilterConfig(), FilterConfig(location="target", sigma=-1.0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_value_that_is_not_finite_makes_the_loss_nan_and_the_gradient_zero(
    config: FilterConfig, bad: float, shape: tuple[int, int]
) -> None:
    z1, z2 = two_views(*shape, "flat")
    z1[3, 5] = bad
    loss, *grads = gradients(z1, z2, config)
    assert loss.isnan()
    for grad in grads:
        assert grad.isfinite().all()


# ---- the reference's traps, by their numbers in the method notes ------------------------------


def test_the_target_is_filtered_in_its_own_basis_unless_told_otherwise() -> None:
    """Trap 15: the ImageNet code filters the target by the online branch's spectrum."""
    z1, z2 = two_views(24, 64, "k^-1/2")
    own = FilterConfig(location="target", sigma=-1.0)
    loss = spectral_loss(z1, z2, own)
    W1, W2 = paper_filter(z1, own), paper_filter(z2, own)
    expected = -(
        F.cosine_similarity(z1.double(), z2.double() @ W2).mean()
        + F.cosine_similarity(z2.double(), z1.double() @ W1).mean()
    )
    assert abs(loss - expected / 2) <= 1e-6


def test_the_kind_is_heeded_on_the_target() -> None:
    """Trap 16: the reference filters every target as kind=poly."""
    z1, z2 = two_views(24, 64, "k^-1")
    log = spectral_loss(z1, z2, FilterConfig(location="target", kind="log_1"))
    poly = spectral_loss(z1, z2, FilterConfig(location="target", kind="poly"))
    assert abs(log - poly) > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "log1"}, {"location": "traget"}, {"basis": "own_"}, {"engine": "svd"}],
    ids=str,
)
def test_an_unknown_name_is_refused(wrong: dict[str, str]) -> None:
    """Traps 18 and 19: an unknown type is silently sigma 2, an unknown location returns None."""
    with pytest.raises(ValueError, match=r"filter\.\w+='\w+' is unknown: (did you mean|use one)"):
        FilterConfig(**wrong)  # type: ignore[arg-type]


def test_centring_takes_a_common_offset_out_of_the_filter() -> None:
    """Trap 22: without a final batch norm the first direction is the mean, and s^1 amplifies it."""
    z, _ = two_views(24, 64, "k^-1/2")
    offset = 100 * torch.ones(64)
    V, g = right_vectors((z.double() + offset)[None], FilterConfig(center=True))
    expected = paper_filter(z.double() - z.double().mean(0), FilterConfig())
    W = (V[0] * g[0]) @ V[0].mT
    assert relative(W / W.norm(), expected / expected.norm()) <= 1e-5
    amplified, gain = right_vectors((z.double() + offset)[None], FilterConfig())
    mean = F.normalize(offset.double(), dim=0)
    assert (mean @ amplified[0, :, gain[0].argmax()]).abs() > 0.99


def test_one_decomposition_a_step_and_no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 23: two SVDs a step. Both views go through one batched call here."""
    calls: list[tuple[int, ...]] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: (calls.append(tuple(A.shape)), eigh(A))[1])
    monkeypatch.setattr(torch.linalg, "svd", None)
    gradients(*two_views(24, 64, "flat"), FilterConfig())
    assert calls == [(2, 24, 24)]


@pytest.mark.parametrize("config", [FilterConfig(sigma=-0.5), FilterConfig(kind="log")], ids=name)
def test_negative_eigenvalues_of_a_collapsed_gram_matrix_do_no_harm(config: FilterConfig) -> None:
    """Trap 17: with B >= D the reference takes the root of eigenvalues that rounding made < 0."""
    z1, z2 = two_views(256, 100, "rank 8")
    assert (torch.linalg.eigvalsh(z1.mT @ z1) < 0).any()
    loss, *grads = gradients(z1, z2, config)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)


def test_the_null_direction_of_centred_features_takes_no_part() -> None:
    """Traps 20 and 21: log of a rounding error, and 0^0 = 1, let the all-ones sample in."""
    z1, z2 = (z - z.mean(dim=0) for z in two_views(24, 64, "flat"))
    for config in (FilterConfig(kind="log"), FilterConfig(location="target", sigma=-1.0)):
        loss, *grads = gradients(z1, z2, config)
        expected, *expected_grads = paper_loss(z1.double(), z2.double(), config)
        assert abs(loss - expected) <= 1e-5
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert relative(grad, expected_grad) <= 1e-4


def test_the_log_filter_cuts_off_exact_zeros() -> None:
    z1, z2 = two_views(24, 64, "rank 8")
    z1[:, :32] = 0
    loss, *grads = gradients(z1, z2, FilterConfig(kind="log"))
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sigma_2_does_not_overflow_when_one_direction_holds_all_the_energy(
    dtype: torch.dtype,
) -> None:
    """Traps 25 and 27: the reference casts W to float16, whatever the input, and s^2 > 65504."""
    z1, z2 = two_views(256, 512, "k^-2", torch.float32)
    z1, z2 = (1000 * z1).to(dtype), (1000 * z2).to(dtype)
    assert torch.linalg.matrix_norm(z1.double(), 2) > 256
    a = z1.clone().requires_grad_()
    loss = spectral_loss(a, z2, FilterConfig(sigma=2.0))
    (2**16 * loss).backward()  # loss scaling: float16 ends at 6e-8
    expected, expected_grad, _ = paper_loss(z1, z2, FilterConfig(sigma=2.0))
    assert abs(loss.detach() - expected) <= 1e-6
    assert a.grad is not None and a.grad.dtype == dtype
    assert relative(a.grad.double() / 2**16, expected_grad) <= torch.finfo(dtype).eps + 1e-5


def test_autocast_does_not_reach_the_filter() -> None:
    """Trap 26: the reference's products run in float16 under autocast."""
    z1, z2 = two_views(24, 64, "k^-1")
    plain = spectral_loss(z1, z2, FilterConfig())
    with torch.autocast("cpu", torch.bfloat16):
        cast = spectral_loss(z1, z2, FilterConfig())
    assert cast.dtype == torch.float32 and torch.equal(plain, cast)


def test_the_gradient_does_not_pass_through_the_filter() -> None:
    """It is dL/dy W: adding to p a direction orthogonal to the batch's row space changes nothing,
    so the gradient lies in that row space (B < D)."""
    z1, z2 = two_views(24, 64, "flat")
    _, grad, _ = gradients(z1, z2, FilterConfig())
    _, _, Vh = torch.linalg.svd(z1.double(), full_matrices=False)
    outside = grad.double() - grad.double() @ Vh.mT @ Vh
    assert outside.norm() <= 1e-6 * grad.norm()


def test_nothing_but_the_scale_of_the_loss_reaches_backward() -> None:
    z1, z2 = two_views(24, 64, "flat")
    _, once, _ = gradients(z1, z2, FilterConfig())
    a = z1.clone().requires_grad_()
    (3 * spectral_loss(a, z2, FilterConfig())).backward()
    torch.testing.assert_close(a.grad, 3 * once)


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
    import rdm_fast.spectral as spectral

    taken: list[bool] = []
    original = spectral.filtered_cosine

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        taken.append(args[6] is not None)
        return original(*args, **kwargs)

    monkeypatch.setattr(spectral, "filtered_cosine", counted)
    spectral_loss(*two_views(16, 32, "flat"), FilterConfig())
    spectral_loss(*two_views(32, 16, "flat"), FilterConfig())
    spectral_loss(*two_views(32, 16, "flat"), FilterConfig(engine="reference"))
    assert taken == [True, False]  # by samples, by features


def test_gemm_says_that_it_is_not_built_yet() -> None:
    with pytest.raises(Unavailable, match=r"filter\.engine=gemm is not built yet: use"):
        SpectralPredictor(FilterConfig(engine="gemm"))


def test_mismatched_branches_are_named() -> None:
    with pytest.raises(ValueError, match=r"got online torch.float32 \(2, 4, 8\) and target"):
        spectral_cosine(torch.zeros(2, 4, 8), torch.zeros(2, 4, 9), FilterConfig())


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
    for name in ("all_reduce", "all_gather", "reduce_scatter_tensor", "broadcast"):
        setattr(dist, name, None)  # anything else would fail
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
def test_centring_a_gram_matrix_is_that_of_centred_samples(shape: tuple[int, int]) -> None:
    X = two_views(*shape, "k^-1/2", torch.float64)[0][None] + 3.0
    centred = gram(X - X.mean(dim=1, keepdim=True))
    torch.testing.assert_close(centre_samples(gram(X)), centred, rtol=0, atol=1e-9)
