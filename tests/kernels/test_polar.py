"""rdm_kernels.polar against the SVD in float64, and its schedule against what it promises."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels import polar
from rdm_kernels.polar import SAFETY, bound, iterations_for, schedule
from tests.spectra import relative, two_views, with_spectrum

SPECTRA = {
    "flat": torch.linspace(1, 0.8, 24),
    "k^-1/2": torch.arange(1, 25) ** -0.5,
    "k^-1": torch.arange(1, 25) ** -1.0,
    "k^-2": torch.arange(1, 25) ** -2.0,
    "clusters": 10.0 ** -(torch.arange(24) // 8),
    "one": torch.ones(24),
}
SHAPES = [(24, 40), (24, 24), (40, 24)]
U = 2.0**-24  # of float32, amplified by at most 1 / lower on the way to 1


def exact(X: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return U @ Vh


def composed(s: Tensor, lower: float, iterations: int) -> Tensor:
    for a, b, c in schedule(lower, iterations).coefficients:
        s = a * s + b * s**3 + c * s**5
    return s


@settings(max_examples=40)
@given(decades=st.floats(0.01, 6), iterations=st.integers(1, 14))
def test_a_schedule_maps_its_interval_into_the_error_it_states(
    decades: float, iterations: int
) -> None:
    lower = 10.0**-decades
    error = schedule(lower, iterations).error
    s = torch.cat(
        [
            torch.linspace(lower, 1, 3001, dtype=torch.float64),
            torch.logspace(-decades, 0, 3001, dtype=torch.float64),
        ]
    ).clamp(lower, 1)
    reached = (composed(s, lower, iterations) - 1).abs().max().item()
    assert reached <= error * (1 + 1e-9) + 4e-15


@pytest.mark.parametrize("lower", [1e-1, 1e-2, 1e-3, 3e-4])
def test_a_single_quintic_is_the_best_there_is(lower: float) -> None:
    """de la Vallee Poussin: an error that alternates at four points is least for three unknowns."""
    s = torch.logspace(torch.tensor(lower).log10(), 0, 100_001, dtype=torch.float64)
    error = composed(s, lower, 1) - 1
    largest = schedule(lower, 1).error
    at_largest = error[error.abs() >= largest * (1 - 1e-6)].sign()
    alternations = int((at_largest.diff() != 0).sum())
    assert alternations == 3


@pytest.mark.parametrize("lower", [1e-1, 1e-2, 1e-3, 3e-4, 1e-4])
def test_more_iterations_err_less_and_iterations_for_finds_the_fewest(lower: float) -> None:
    errors = [schedule(lower, k).error for k in range(1, 13)]
    assert all(b < a or b < 1e-14 for a, b in pairwise(errors))
    k = iterations_for(lower, 1e-3)
    assert errors[k - 1] <= 1e-3 < errors[k - 2]


def test_the_safety_factor_holds_singular_values_over_the_bound() -> None:
    """Without it a value of 1.02 leaves the interval and grows; with it all stay under 2.05."""
    s = torch.linspace(1, SAFETY, 101, dtype=torch.float64)
    for a, b, c in schedule(3e-4, 7).coefficients:
        s = a * s + b * s**3 + c * s**5
        assert s.min() > 0 and s.max() < 2.05
    assert (s - 1).abs().max() <= schedule(3e-4, 7).error * 1.01


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("lower", "iterations"), [(3e-4, 7), (1e-3, 6), (1e-3, 9)])
def test_singular_values_over_lower_become_one_within_the_stated_error(
    name: str, shape: tuple[int, int], lower: float, iterations: int
) -> None:
    """So the distance to the exact factor, in the 2-norm, is the error; float32 adds rounding."""
    X = with_spectrum(*shape, SPECTRA[name])
    expected = exact(X)
    error = schedule(lower, iterations).error
    found = polar(X, lower=lower, iterations=iterations)
    assert torch.linalg.matrix_norm(found - expected, 2) <= error + 1e-12
    found = polar(X.float(), lower=lower, iterations=iterations)
    assert torch.linalg.matrix_norm(found - expected, 2) <= error + U / lower


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_narrow_inputs_under_autocast_are_computed_in_float32(dtype: torch.dtype) -> None:
    X = with_spectrum(24, 40, SPECTRA["k^-1/2"]).to(dtype)
    expected = polar(X.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = polar(X)
    assert found.dtype == torch.float32
    assert torch.linalg.matrix_norm(found - expected, 2) <= U / 3e-4


@pytest.mark.parametrize("scale", [2.0**-140, 1e-30, 1e4, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    X = with_spectrum(8, 12, torch.linspace(1, 0.5, 8)).float()
    scaled = (X.double() * scale).float()
    expected = exact(scaled)
    error = schedule(3e-4, 7).error + U / 3e-4
    assert torch.linalg.matrix_norm(polar(scaled) - expected, 2) <= error


def test_smaller_singular_values_keep_their_order_and_stay_in_range() -> None:
    s = torch.logspace(0, -7, 16, dtype=torch.float64)
    X = with_spectrum(16, 20, s)
    found = torch.linalg.svdvals(polar(X))
    error = schedule(3e-4, 7).error
    assert found.max() <= 1 + error and found.min() < 0.1
    assert torch.linalg.matrix_norm(polar(X) @ X.mT - (polar(X) @ X.mT).mT) <= 1e-12


def test_zero_is_zero_and_a_matrix_that_is_not_finite_harms_no_other() -> None:
    X = torch.stack([with_spectrum(8, 12, torch.linspace(1, 0.5, 8), i).float() for i in range(4)])
    clean = polar(X)
    X[1, 2, 3] = torch.nan
    X[2, 2, 3] = torch.inf
    X[3] = 0
    found = polar(X)
    assert torch.equal(found[0], clean[0]) and not found[3].any()
    assert not found[1].isfinite().any() and not found[2].isfinite().any()


def target_gradient(P: Tensor, Z: Tensor) -> Tensor:
    """Of -mean cos(P, Z) for P, by autograd in float64."""
    p = P.double().requires_grad_()
    (-F.cosine_similarity(p, Z.double(), dim=1).mean()).backward()
    assert p.grad is not None
    return p.grad


@pytest.mark.parametrize("shape", [(128, 384), (200, 200), (384, 128)], ids=str)
@pytest.mark.parametrize("name", ["flat", "k^-1/2", "k^-1", "clusters"])
def test_float16_leaves_the_gradient_to_six_thousandths(name: str, shape: tuple[int, int]) -> None:
    X, P = two_views(*shape, name, torch.bfloat16)
    found = polar(X, precision="fp16")
    assert found.dtype == torch.float32
    error = relative(target_gradient(P, found), target_gradient(P, exact(X)))
    assert 1e-3 < error <= 6e-3  # under that it was no float16
    assert torch.linalg.matrix_norm(found, 2) <= 1 + schedule(3e-4, 7).error + 2.0**-11


def test_float16_of_a_collapsed_batch_with_noise() -> None:
    X, P = two_views(128, 384, "rank 8", torch.float64)
    X = X + 1e-3 * torch.randn(128, 384, dtype=torch.float64)
    found = target_gradient(P, polar(X.bfloat16(), precision="fp16"))
    assert relative(found, target_gradient(P, exact(X.bfloat16()))) <= 2e-2


@pytest.mark.parametrize("name", ["flat", "k^-2", "rank 1", "rank 8", "straddling"])
@pytest.mark.parametrize("scale", [4.0**-20, 1.0, 4.0**20])
def test_float16_neither_overflows_nor_blows_up(name: str, scale: float) -> None:
    """Whatever the scale: X is divided by its largest element before it is rounded."""
    X, _ = two_views(64, 96, name, torch.float32)
    found = polar(X * scale, precision="fp16")
    assert torch.linalg.matrix_norm(found, 2) <= 1 + schedule(3e-4, 7).error + 2.0**-11
    assert torch.equal(found, polar(X, precision="fp16"))


def test_float16_of_zero_is_zero_and_what_is_not_finite_harms_no_other() -> None:
    X = torch.stack([with_spectrum(8, 12, torch.linspace(1, 0.5, 8), i).float() for i in range(3)])
    clean = polar(X, precision="fp16")
    X[1, 2, 3] = torch.nan
    X[2] = 0
    found = polar(X, precision="fp16")
    assert torch.equal(found[0], clean[0]) and not found[2].any()
    assert not found[1].isfinite().any()


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match="'bf16'"):
        polar(torch.eye(3), precision="bf16")  # type: ignore[arg-type]


@settings(max_examples=30)
@given(n=st.integers(1, 20), seed=st.integers(0, 2**31), power=st.floats(0, 3))
def test_the_bound_is_one_and_at_most_a_fourth_root_of_n_over(
    n: int, seed: int, power: float
) -> None:
    s = torch.arange(1, n + 1, dtype=torch.float64) ** -power
    X = with_spectrum(n, n, s, seed)
    c = float(bound((X @ X.mT)[None]))
    largest = float(s[0] ** 2)
    assert largest * (1 - 1e-12) <= c <= n**0.25 * largest * (1 + 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lower": 0.0}, "lower in"),
        ({"lower": 1.0}, "lower in"),
        ({"iterations": 0}, "at least one iteration"),
    ],
)
def test_schedules_that_cannot_be_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        polar(torch.eye(3), **arguments)


def test_what_is_not_a_matrix_is_named() -> None:
    with pytest.raises(ValueError, match=r"floating X \[\.\.\., B, D\]"):
        polar(torch.ones(3))
