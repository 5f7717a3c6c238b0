"""filters.loss on degenerate batches, and the traps of the paper's released code."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rdm_fast.config import FilterConfig
from rdm_fast.filters.decomposition import right_vectors
from rdm_fast.filters.loss import spectral_loss
from tests.spectra import (
    ONLINE,
    SHAPES,
    TARGET,
    Shape,
    gradients,
    name,
    paper_filter,
    paper_loss,
    relative,
    two_views,
    with_spectrum,
)
from tests.spies import refused
from tests.thinned import in_turn

pytestmark = pytest.mark.filterwarnings("ignore:filter.location")


# ---- where the reference is not well defined --------------------------------------------------

HARD = {
    "zero": lambda z: torch.zeros_like(z),
    "duplicated rows": lambda z: z[:1].expand_as(z).clone(),
    "one zero row": lambda z: z.index_fill(0, torch.tensor(0), 0.0),
    "centered": lambda z: z - z.mean(dim=0),
    "scale 1e4": lambda z: z * 1e4,
    "scale 1e-4": lambda z: z * 1e-4,
}


@pytest.mark.parametrize(
    ("config", "case", "shape", "dtype"),
    in_turn(
        2,
        [*ONLINE, *TARGET, FilterConfig(sigma=-0.5), FilterConfig(sigma=-1.0)],
        list(HARD),
        SHAPES,
        [torch.float32, torch.bfloat16, torch.float16],
    ),
    ids=name,
)
def test_gradients_are_finite_and_bounded_on_degenerate_batches(
    config: FilterConfig, case: str, shape: Shape, dtype: torch.dtype
) -> None:
    """|dL/dp_i| |p_i| is at most (g_max / g_min kept) / 2b for a cosine of filtered rows, and
    with the default cutoff that quotient is at most 10,000 for |sigma| <= 1."""
    z1, z2 = two_views(*shape, "k^-1", torch.float32)
    z1, z2 = HARD[case](z1).to(dtype), HARD[case](z2).to(dtype)
    loss, *grads = gradients(z1, z2, config)
    assert -1 - 1e-6 <= loss <= 1 + 1e-6
    for grad, z in zip(grads, (z1, z2), strict=True):
        assert grad.isfinite().all()
        nonzero = z.float().norm(dim=1) > 0
        size = (grad.float().norm(dim=1) * z.float().norm(dim=1))[nonzero]
        assert (size <= 10_000 / 2 / shape[0]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", [FilterConfig(), FilterConfig(location="target", sigma=-1.0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_value_that_is_not_finite_makes_the_loss_nan_and_leaves_the_gradient_finite(
    config: FilterConfig, bad: float, shape: Shape
) -> None:
    z1, z2 = two_views(*shape, "flat")
    z1[3, 5] = bad
    loss, *grads = gradients(z1, z2, config)
    assert loss.isnan() and all(grad.isfinite().all() for grad in grads)


# ---- the reference's traps, by their numbers in the method notes ------------------------------


def test_the_kind_applies_on_the_target() -> None:
    """Trap 16: the reference filters every target as kind=poly."""
    z1, z2 = two_views(24, 64, "k^-1")
    log = spectral_loss(z1, z2, FilterConfig(location="target", kind="log_1"))
    poly = spectral_loss(z1, z2, FilterConfig(location="target", kind="poly"))
    assert abs(log - poly) > 1e-3


@pytest.mark.parametrize("setting", ["kind", "location", "basis", "engine"])
def test_an_unknown_name_is_refused(setting: str) -> None:
    """Traps 18 and 19: an unknown type is silently sigma 2, an unknown location returns None."""
    with refused(ValueError, f"filter.{setting}"):
        FilterConfig(**{setting: "own_"})  # type: ignore[arg-type]


def test_centering_takes_a_common_offset_out_of_the_filter() -> None:
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
def test_negative_eigenvalues_of_a_collapsed_gram_matrix_are_harmless(config: FilterConfig) -> None:
    """Trap 17: with B >= D the reference takes the root of eigenvalues that rounding made < 0."""
    z1, z2 = two_views(256, 100, "rank 8")
    assert (torch.linalg.eigvalsh(z1.mT @ z1) < 0).any()
    loss, *grads = gradients(z1, z2, config)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)


def test_the_null_direction_of_centered_features_is_cut_off() -> None:
    """Traps 20 and 21: log of a rounding error, and 0^0 = 1, let the all-ones sample in."""
    z1, z2 = (z - z.mean(dim=0) for z in two_views(24, 64, "flat"))
    for config in (FilterConfig(kind="log"), FilterConfig(location="target", sigma=-1.0)):
        loss, *grads = gradients(z1, z2, config)
        expected, *expected_grads = paper_loss(z1.double(), z2.double(), config)
        assert abs(loss - expected) <= 1e-5
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert relative(grad, expected_grad) <= 1e-4


def all_directions(X: torch.Tensor, config: FilterConfig) -> torch.Tensor:
    """W of the released code, which cuts nothing off, in float64."""
    _, s, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return (Vh.mT * s**config.sigma) @ Vh


@pytest.mark.parametrize("sigma", [-1.0, -0.5])
@pytest.mark.parametrize("location", ["online", "target"])
def test_genuine_directions_of_square_batches_are_kept(location: Any, sigma: float) -> None:
    """A Gaussian batch of 256 x 256 has s_n / s_1 = 6.5e-4, and RDM-BYOL's on CIFAR has that size.
    A cutoff of 1e-3 would drop three of these 64."""
    s = torch.cat([torch.linspace(1, 0.1, 61), torch.tensor([8e-4, 4e-4, 2e-4])])
    z1, z2 = (with_spectrum(64, 64, 8 * s, seed).float() for seed in (0, 1))
    config = FilterConfig(location=location, sigma=sigma)
    _, *grads = gradients(z1, z2, config)
    _, *expected = paper_loss(z1, z2, config, filter_of=all_directions)
    for grad, exact in zip(grads, expected, strict=True):
        assert relative(grad, exact) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sigma_2_does_not_overflow_if_one_direction_has_all_the_energy(dtype: torch.dtype) -> None:
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
