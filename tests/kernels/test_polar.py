"""rdm_kernels.polar against the SVD in float64, and its schedule against its stated error."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels import polar
from rdm_kernels.polar import SAFETY, bound, iterations_for, schedule
from tests.kernels.common import DEVICE, U
from tests.spectra import spectrum, with_spectrum

SPECTRA = {name: spectrum(name, 24) for name in ("flat", "k^-1/2", "k^-1", "k^-2", "clusters")}
SPECTRA["one"] = torch.ones(24)
ROUNDING = U / 3e-4  # of float32, amplified by at most 1 / lower on the way to 1


def matrix(B: int, D: int, s: Tensor, seed: int = 0) -> Tensor:
    return with_spectrum(B, D, s, seed).to(DEVICE)


def distance(found: Tensor, X: Tensor) -> float:
    """Distance in the 2-norm to the exact factor of X."""
    U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return float(torch.linalg.matrix_norm(found - U @ Vh, 2))


def composed(s: Tensor, lower: float, iterations: int) -> Tensor:
    for a, b, c in schedule(lower, iterations).coefficients:
        s = a * s + b * s**3 + c * s**5
    return s


@settings(max_examples=40)
@given(decades=st.floats(0.01, 6), iterations=st.integers(1, 14))
def test_a_schedule_maps_its_interval_into_its_error(decades: float, iterations: int) -> None:
    lower = 10.0**-decades
    s = [torch.linspace(lower, 1, 3001).double(), torch.logspace(-decades, 0, 3001).double()]
    reached = (composed(torch.cat(s).clamp(lower, 1), lower, iterations) - 1).abs().max().item()
    assert reached <= schedule(lower, iterations).error * (1 + 1e-9) + 4e-15


@pytest.mark.parametrize("lower", [1e-1, 1e-2, 1e-3, 3e-4])
def test_a_single_quintic_is_the_best_there_is(lower: float) -> None:
    """de la Vallee Poussin: an error that alternates at four points is least for three unknowns."""
    s = torch.logspace(torch.tensor(lower).log10(), 0, 100_001, dtype=torch.float64)
    error = composed(s, lower, 1) - 1
    at_largest = error[error.abs() >= schedule(lower, 1).error * (1 - 1e-6)].sign()
    assert int((at_largest.diff() != 0).sum()) == 3


@pytest.mark.parametrize("lower", [1e-1, 1e-2, 1e-3, 3e-4, 1e-4])
def test_more_iterations_err_less_and_iterations_for_finds_the_fewest(lower: float) -> None:
    errors = [schedule(lower, k).error for k in range(1, 13)]
    assert all(b < a or b < 1e-14 for a, b in pairwise(errors))
    k = iterations_for(lower, 1e-3)
    assert errors[k - 1] <= 1e-3 < errors[k - 2]


def test_the_safety_factor_holds_singular_values_above_the_bound() -> None:
    """Without it a value of 1.02 leaves the interval and grows; with it all stay under 2.05."""
    s = torch.linspace(1, SAFETY, 101, dtype=torch.float64)
    for a, b, c in schedule(3e-4, 7).coefficients:
        s = a * s + b * s**3 + c * s**5
        assert s.min() > 0 and s.max() < 2.05
    assert (s - 1).abs().max() <= schedule(3e-4, 7).error * 1.01


@pytest.mark.parametrize("shape", [(24, 40), (24, 24), (40, 24)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("lower", "iterations"), [(3e-4, 7), (1e-3, 6), (1e-3, 9)])
def test_values_become_1(name: str, shape: tuple[int, int], lower: float, iterations: int) -> None:
    X = matrix(*shape, SPECTRA[name])
    error = schedule(lower, iterations).error
    assert distance(polar(X, lower=lower, iterations=iterations), X) <= error + 1e-12
    narrow = polar(X.float(), lower=lower, iterations=iterations)
    assert distance(narrow, X) <= error + U / lower


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_narrow_inputs_under_autocast_are_computed_in_float32(dtype: torch.dtype) -> None:
    X = matrix(24, 40, SPECTRA["k^-1/2"]).to(dtype)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = polar(X)
    assert found.dtype == torch.float32
    assert torch.linalg.matrix_norm(found - polar(X.double()), 2) <= ROUNDING


@pytest.mark.parametrize("scale", [2.0**-140, 1e-30, 1e4, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    scaled = (matrix(8, 12, torch.linspace(1, 0.5, 8)) * scale).float()
    assert distance(polar(scaled), scaled) <= schedule(3e-4, 7).error + ROUNDING


def test_smaller_singular_values_keep_their_order_and_stay_in_range() -> None:
    X = matrix(16, 20, torch.logspace(0, -7, 16, dtype=torch.float64))
    found = torch.linalg.svdvals(polar(X))
    assert found.max() <= 1 + schedule(3e-4, 7).error and found.min() < 0.1
    positive = polar(X) @ X.mT
    assert torch.linalg.matrix_norm(positive - positive.mT) <= 1e-12


def test_zero_is_zero_and_a_matrix_that_is_not_finite_harms_no_other() -> None:
    X = torch.stack([matrix(8, 12, torch.linspace(1, 0.5, 8), i).float() for i in range(4)])
    clean = polar(X)
    X[1, 2, 3] = torch.nan
    X[2, 2, 3] = torch.inf
    X[3] = 0
    found = polar(X)
    assert torch.equal(found[0], clean[0]) and not found[3].any()
    assert not found[1].isfinite().any() and not found[2].isfinite().any()


def test_any_number_of_batch_dimensions() -> None:
    X = matrix(6, 8, torch.linspace(1, 0.5, 6))
    for batch in ((), (1,), (2, 3)):
        found = polar(X.expand(*batch, 6, 8))
        torch.testing.assert_close(found, polar(X).expand(*batch, 6, 8), rtol=0, atol=1e-12)


@settings(max_examples=30)
@given(n=st.integers(1, 20), seed=st.integers(0, 2**31), power=st.floats(0, 3))
def test_the_bound_is_at_least_lambda_max_and_tight(n: int, seed: int, power: float) -> None:
    s = torch.arange(1, n + 1, dtype=torch.float64) ** -power
    X = matrix(n, n, s, seed)
    c = float(bound((X @ X.mT)[None]))
    largest = float(s[0] ** 2)
    assert largest * (1 - 1e-12) <= c <= n**0.25 * largest * (1 + 1e-12)
