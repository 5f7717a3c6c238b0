"""rdm_kernels.matrix_power and its relatives against known spectra and finite differences."""

from collections.abc import Callable
from functools import partial

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels import matrix_inverse_sqrt, matrix_log, matrix_log1p, matrix_power, matrix_sqrt
from rdm_kernels.matrix_power import divided_differences
from tests.kernels.common import DEVICE, rotated

EPS = torch.finfo(torch.float64).eps
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "power -1": (partial(matrix_power, exponent=-1.0), lambda x: 1 / x),
    "power -0.25": (partial(matrix_power, exponent=-0.25), lambda x: x**-0.25),
    "power 0": (partial(matrix_power, exponent=0.0), torch.ones_like),
    "power 2": (partial(matrix_power, exponent=2.0), torch.square),
    "sqrt": (matrix_sqrt, torch.sqrt),
    "inverse_sqrt": (matrix_inverse_sqrt, torch.rsqrt),
    "log": (matrix_log, torch.log),
    "log1p": (matrix_log1p, torch.log1p),
}
ALL = pytest.mark.parametrize("name", FUNCTIONS)


@ALL
@settings(max_examples=15)
@given(
    eigenvalues=st.lists(
        st.sampled_from([1e-4, 0.01, 0.1, 0.3, 1.0, 2.0]), min_size=1, max_size=10
    ),
    seed=st.integers(0, 2**31),
)
def test_drawn_spectra_are_mapped(name: str, eigenvalues: list[float], seed: int) -> None:
    """n eps lambda_max times the largest slope, which is that at an end of the range."""
    function, f = FUNCTIONS[name]
    expected = torch.tensor(eigenvalues, dtype=torch.float64, device=DEVICE)
    A, Q = rotated(expected, seed)
    slope = torch.func.vmap(torch.func.grad(lambda x: f(x)))(expected).abs().max()
    n = len(expected)
    bound = 8 * n * EPS * (expected.max() * slope + f(expected).abs().max())
    unit, result = function(torch.stack([torch.eye(n).to(A), A]))
    torch.testing.assert_close(result, Q * f(expected) @ Q.mT, atol=float(bound), rtol=0)
    assert torch.equal(result, result.mT)
    torch.testing.assert_close(unit, f(torch.ones(n).to(A)).diag(), atol=1e-15, rtol=1e-15)


@settings(max_examples=30)
@given(a=st.floats(-2, 2), b=st.floats(-2, 2), null=st.integers(0, 3), seed=st.integers(0, 2**31))
def test_exponents_add(a: float, b: float, null: int, seed: int) -> None:
    """Also those of a singular matrix, which has powers on its range only.

    Its zeros come with rounding of either sign. At condition 100, factors of up to 1e4 are summed,
    with rounding 1e-16 and slope 1e4.
    """
    eigenvalues = torch.cat([torch.zeros(null), torch.logspace(-1, 1, 5)])
    A, _ = rotated(eigenvalues, seed)
    product = matrix_power(A, a) @ matrix_power(A, b)
    unit = 10.0 ** (abs(a) + abs(b))
    torch.testing.assert_close(
        product / unit, matrix_power(A, a + b) / unit, atol=100 * 8 * EPS * 10, rtol=0
    )


def test_log1p_keeps_the_digits_of_a_small_matrix() -> None:
    """log(I + A) = A - A^2 / 2 + ..., where forming I + A would lose all of A."""
    A, _ = rotated(torch.tensor([1e-20, 3e-20, 0.0]))
    torch.testing.assert_close(matrix_log1p(A), (A + A.mT) / 2, atol=1e-34, rtol=0)


GRADIENT_SPECTRA = {
    "simple": torch.tensor([0.3, 1.0, 2.0, 5.0]),
    "identity": torch.ones(4),
    "pairs": torch.tensor([0.5, 0.5, 3.0, 3.0]),
    "projector": torch.tensor([0.0, 0.0, 1.0, 1.0]),
    "close": torch.tensor([1.0, 1.0 + 1e-9, 1.0 + 2e-9, 2.0], dtype=torch.float64),
}


@ALL
@pytest.mark.parametrize("spectrum", GRADIENT_SPECTRA)
@pytest.mark.parametrize("rotate", [False, True], ids=["diagonal", "rotated"])
def test_gradients_equal_finite_differences(name: str, spectrum: str, rotate: bool) -> None:
    """Differences of 1e-6 stay under the cutoff of 1e-3 on the null space of the projector."""
    function, _ = FUNCTIONS[name]
    eigenvalues = GRADIENT_SPECTRA[spectrum].double()
    A = rotated(eigenvalues)[0] if rotate else torch.diag(eigenvalues).to(DEVICE)
    cutoff = {} if name == "log1p" else {"cutoff": 1e-3}
    torch.autograd.gradcheck(partial(function, **cutoff), A.requires_grad_())


@pytest.mark.parametrize("kind", ["power", "log", "log1p"])
@pytest.mark.parametrize(
    "ratio", [1.0, 1 - 2e-16, 1 - 1e-12, 1 - 1e-8, 1 - 1e-4, 0.7, 0.1, 1e-12 / 3]
)
def test_divided_differences_lose_no_digit_at_any_gap(kind: str, ratio: float) -> None:
    """Against the mean slope by Gauss quadrature in log lambda, which subtracts nothing."""
    high = 0.7
    low = high * ratio
    eigenvalues = torch.tensor([low, high], dtype=torch.float64)
    for exponent in (-0.5, 0.25, 1.0, 2.0) if kind == "power" else (0.0,):
        phi = divided_differences(eigenvalues, torch.ones(2, dtype=torch.bool), kind, exponent)
        shift = 1.0 if kind == "log1p" else 0.0
        power = exponent if kind == "power" else 0.0
        h, l = eigenvalues[1].item() + shift, eigenvalues[0].item() + shift
        # d f / d log(lambda) = p lambda^p or 1; mean over lambda = integral over log / (h - l)
        difference = eigenvalues[1].item() - eigenvalues[0].item()
        x, w = numpy.polynomial.legendre.leggauss(80)
        width = -numpy.log1p(-difference / h) if difference < h / 2 else numpy.log(h / l)
        t = numpy.log(h) - width * (x + 1) / 2
        slope = power * numpy.exp(power * t) if kind == "power" else numpy.ones_like(t)
        if difference:
            expected = float((w * slope).sum() / 2 * width / difference)
        else:
            expected = power * h ** (power - 1) if kind == "power" else 1 / h
        assert phi[0, 1].item() == pytest.approx(expected, rel=2e-14)
        assert torch.equal(phi, phi.mT)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_under_autocast_cost_only_rounding(name: str, dtype: torch.dtype) -> None:
    function, _ = FUNCTIONS[name]
    A = rotated(torch.logspace(-1, 1, 6))[0].to(dtype)
    A = (A + A.mT) / 2
    weight = rotated(torch.arange(6.0) - 2, seed=1)[0]
    results = []
    for leaf in (A.clone().requires_grad_(), A.double().requires_grad_()):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=leaf.dtype == dtype):
            result = function(leaf)
        (grad,) = torch.autograd.grad((result.double() * weight).sum(), leaf)
        results.append((result, grad))
    (result, grad), (expected, expected_grad) = results
    assert result.dtype == torch.float32 and grad.dtype == dtype
    u32, u = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    assert (result.double() - expected).norm() <= u32 * expected.norm()
    assert (grad.double() - expected_grad).norm() <= (u + 2 * u32) * expected_grad.norm()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales_of_float32_are_inverted_and_rooted(scale: float) -> None:
    A = (rotated(torch.tensor([1.0, 2.0, 4.0]))[0] * scale).float()
    root = matrix_sqrt(A).double()
    torch.testing.assert_close(root @ root / scale, A.double() / scale, atol=1e-6, rtol=0)
    whiten = matrix_inverse_sqrt(A).double()
    identity = torch.eye(3).to(whiten)
    torch.testing.assert_close(whiten @ A.double() @ whiten, identity, atol=1e-6, rtol=0)


@ALL
def test_a_zero_matrix_is_mapped_to_zero_with_a_finite_gradient(name: str) -> None:
    function, _ = FUNCTIONS[name]
    A = torch.zeros(3, 3, device=DEVICE, requires_grad=True)
    result = function(A)
    result.sum().backward()
    assert not result.any() and A.grad is not None and A.grad.isfinite().all()


def test_a_negative_power_ignores_eigenvalues_up_to_the_cutoff() -> None:
    eigenvalues = torch.tensor([1e-5, 1e-2, 1.0])
    A, Q = rotated(eigenvalues)
    for cutoff, kept in ((1e-6, 3), (1e-3, 2), (0.1, 1)):
        inverse = torch.where(torch.arange(3) >= 3 - kept, 1 / eigenvalues.double(), 0).to(Q)
        found = matrix_power(A, -1.0, cutoff=cutoff)
        torch.testing.assert_close(found, Q * inverse @ Q.mT, atol=1e-7, rtol=1e-6)


@ALL
def test_one_matrix_that_is_not_finite_leaves_the_others_exact(name: str) -> None:
    function, _ = FUNCTIONS[name]
    batch = torch.stack([rotated(torch.logspace(-1, 1, 4), seed)[0] for seed in range(3)])
    results = []
    for bad in (1.0, torch.nan):
        leaf = batch.clone()
        leaf[1, 0, 2] = bad
        leaf.requires_grad_()
        result = function(leaf)
        (grad,) = torch.autograd.grad(result.sum(), leaf)
        results.append((result.detach(), grad))
    (clean, clean_grad), (found, grad) = results
    assert found[1].isnan().all() and torch.equal(found[::2], clean[::2])
    assert not grad[1].any() and torch.equal(grad[::2], clean_grad[::2])


def test_log1p_outside_its_domain_is_not_finite() -> None:
    A = torch.diag(torch.tensor([-2.0, 1.0], device=DEVICE))
    assert not matrix_log1p(A).isfinite().any()
