"""rdm_kernels.matrix_function against the damped filter of an SVD, and autograd, in float64."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_kernels import matrix_function, polar, product, sym_matmul
from rdm_kernels.matrix_function import (
    CHOLESKY_FAILED,
    INACCURATE,
    NOT_FINITE,
    _evaluate,
    _series,
    default_degree,
    interval,
)
from rdm_kernels.tiles import Symmetric
from tests import spectra
from tests.kernels.common import DEVICE
from tests.spectra import relative, spectrum
from tests.spies import Operators

RESPONSES: dict[str, Callable[[Tensor], Tensor]] = {
    "s^0.5": lambda s: s**0.5,
    "s": lambda s: s,
    "log": torch.log,
    "log_1": torch.log1p,
    "log_2": lambda s: (s * s).log1p(),
}
CUTOFF = 1e-3
ALL = pytest.mark.parametrize("name", RESPONSES)
HEALTHY = pytest.mark.parametrize("spectrum_name", ["flat", "k^-1/2", "k^-1", "clusters"])
B, D = 64, 192


def with_spectrum(*args: Any) -> Tensor:
    return spectra.with_spectrum(*args).to(DEVICE)


def literal(X: Tensor, g: Callable[[Tensor], Tensor], tau: Tensor) -> tuple[Tensor, Tensor]:
    """M and h of the damped filter from an SVD: U g(t) s^2 / t^2 U^T and U g(t) / t^2 U^T."""
    U, s, _ = torch.linalg.svd(X.double(), full_matrices=len(X) > X.shape[1])
    s = F.pad(s, (0, U.shape[-1] - len(s)))
    t = (s.square() + tau.double().square()).sqrt()
    return U * (g(t) * (s / t).square()) @ U.mT, U * (g(t) / t.square()) @ U.mT


def gradient(P: Tensor, Z: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """-mean cos(P W, Z) and its gradient for P with W held fixed, by autograd in float64."""
    p = P.double().requires_grad_()
    loss = -F.cosine_similarity(p @ W, Z.double(), dim=1).mean()
    loss.backward()
    assert p.grad is not None
    return loss.detach(), p.grad


def fused(P: Tensor, Z: Tensor, M: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The same from M, h and inner products of rows, in M's dtype: dP = (a O + c M G) h P."""
    P, Z = P.to(M.dtype), Z.to(M.dtype)
    G, O = P @ P.mT, Z @ P.mT
    MG = M @ G
    y, t = (MG * M).sum(dim=1).sqrt(), Z.norm(dim=1)
    dot = (M * O).sum(dim=1)
    a = -1 / (len(P) * y * t)
    c = -a * dot / y.square()
    return (a * dot).sum(), (a[:, None] * O + c[:, None] * MG) @ h @ P


@ALL
@pytest.mark.parametrize(
    "spectrum_name", ["flat", "k^-1", "k^-2", "clusters", "rank 8", "rank B-1"]
)
@pytest.mark.parametrize("shape", [(24, 64), (24, 24), (40, 24), (1, 5)], ids=str)
def test_only_the_series_errs(shape: tuple[int, int], spectrum_name: str, name: str) -> None:
    """Its error on g, 1e-4 for the log, of what g spans; h has it over tau^2 at most."""
    X = with_spectrum(*shape, spectrum(spectrum_name, min(shape)))
    result = matrix_function(X @ X.mT, RESPONSES[name], cutoff=CUTOFF)
    M, h = literal(X, RESPONSES[name], result.tau)
    assert int(result.status) == 0
    tolerance = 1e-4 + 1e-9
    span = 1 if name == "log" else RESPONSES[name](torch.linalg.matrix_norm(X, 2)).item()
    assert torch.linalg.matrix_norm(result.M - M, 2) <= tolerance * max(span, 1)
    ratio = torch.linalg.matrix_norm(result.h - h, 2) * result.tau.square()
    assert ratio <= tolerance * max(span, 1)


@pytest.mark.parametrize("name", [*RESPONSES, "s^-0.5", "s^-0.3"])
@HEALTHY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float32_loss_and_gradient(dtype: torch.dtype, spectrum_name: str, name: str) -> None:
    """Of Gram matrices in float32, against autograd through the damped filter in float64."""
    P, Z = (z.to(DEVICE) for z in spectra.two_views(B, D, spectrum_name, dtype))
    g = RESPONSES.get(name) or (lambda s: s ** float(name[2:]))
    result = matrix_function(P.float() @ P.float().mT, g, cutoff=CUTOFF)
    _, h = literal(P, g, result.tau)
    expected_loss, expected = gradient(P, Z, P.double().mT @ h @ P.double())
    loss, found = fused(P, Z, result.M, result.h)
    assert result.M.dtype == torch.float32 and int(result.status) == 0
    assert float(F.cosine_similarity(found.double().flatten(), expected.flatten(), dim=0)) >= 0.9999
    if name in RESPONSES:
        assert relative(found, expected) <= 2e-3
        assert abs(float(loss - expected_loss)) <= 2e-6


def test_views_of_a_batch_do_not_meet() -> None:
    """Each has its own scale and tau."""
    views = [with_spectrum(12, 20, spectrum(n, 12), i) for i, n in enumerate(["flat", "k^-1"])]
    G = torch.stack([X @ X.mT * scale for X, scale in zip(views, (1.0, 1e6), strict=True)])
    both = matrix_function(G, torch.log1p)
    for i in range(2):
        alone = matrix_function(G[i : i + 1], torch.log1p)
        for found, expected in zip(both, alone, strict=True):
            torch.testing.assert_close(found[i], expected[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
def test_a_scaled_matrix_has_a_scaled_filter(exponent: int) -> None:
    """g(s) = s^0.5 of G 4^k: M times 2^(k/2), h over 2^(3k/2)."""
    X = with_spectrum(12, 20, spectrum("k^-1", 12)).float()
    G = X @ X.mT
    plain = matrix_function(G.double(), torch.sqrt)
    scaled = matrix_function(G.double() * 4.0**exponent, torch.sqrt)
    k = float(exponent)
    torch.testing.assert_close(scaled.M / 2 ** (k / 2), plain.M, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled.h * 2 ** (1.5 * k), plain.h, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scaled.tau / 2**k, plain.tau)


def test_degree_one_is_exact_for_s_and_the_default_is_not_wasted() -> None:
    """s at degree 1 needs no product; halving the default degree costs the log its tolerance."""
    X = with_spectrum(24, 64, spectrum("k^-1", 24))
    result = matrix_function(X @ X.mT, lambda s: s, degree=1)
    M, h = literal(X, lambda s: s, result.tau)
    torch.testing.assert_close(result.M, M, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.h, h, rtol=0, atol=1e-10)
    a, b = interval(CUTOFF)
    s = torch.logspace(math.log10(a), math.log10(b), 2001, dtype=torch.float64, device=DEVICE)
    errors = []
    for degree in (default_degree(CUTOFF), default_degree(CUTOFF) // 2):
        nodes, blocks = _series(a, b, degree, DEVICE)
        coefficients = (blocks @ nodes.log()).expand(len(s), -1, -1)
        S = ((2 * s - a - b) / (b - a))[:, None, None]
        value = _evaluate(coefficients, S, torch.ones_like(S[0]))
        errors.append(float((value.flatten() - s.log()).abs().max()))
    assert errors[0] <= 1e-4 < errors[1]


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5, 8, 12, 13, 64])
def test_blocks_evaluate_any_polynomial_of_the_degree_exactly(degree: int) -> None:
    """A polynomial of the degree is its own interpolant; one by Horner, the other by blocks."""
    a, b = 0.2, 1.0
    nodes, blocks = _series(a, b, degree, DEVICE)
    roots = torch.linspace(-0.5, 1.5, degree, dtype=torch.float64, device=DEVICE)

    def polynomial(s: Tensor) -> Tensor:
        return (2 * (s[..., None] - roots)).prod(dim=-1)

    s = torch.linspace(a, b, 57, dtype=torch.float64, device=DEVICE)
    S = ((2 * s - a - b) / (b - a))[:, None, None]
    coefficients = (blocks @ polynomial(nodes)).expand(len(s), -1, -1)
    found = _evaluate(coefficients, S, torch.ones_like(S[0])).flatten()
    unit = polynomial(nodes).abs().max()
    torch.testing.assert_close(found / unit, polynomial(s) / unit, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_view_that_is_not_finite_is_flagged_and_harms_no_other(bad: float) -> None:
    X = torch.stack([with_spectrum(8, 12, spectrum("flat", 8), i).float() for i in range(3)])
    G = X @ X.mT
    clean = matrix_function(G, torch.sqrt)
    G[1, 2, 3] = bad
    found = matrix_function(G, torch.sqrt)
    assert found.status.tolist() == [0, NOT_FINITE, 0] and found.status.dtype == torch.int32
    assert found.M[1].isnan().all() and found.h[1].isnan().all()
    for i in (0, 2):
        assert torch.equal(found.M[i], clean.M[i]) and torch.equal(found.h[i], clean.h[i])


def test_an_indefinite_matrix_is_flagged_and_its_filter_is_zero() -> None:
    G = torch.diag(torch.tensor([1.0, 0.5, -0.1], device=DEVICE))[None]
    found = matrix_function(G, torch.sqrt)
    assert int(found.status) & CHOLESKY_FAILED
    assert not found.M.any() and not found.h.any()


def test_products_rounded_to_tf32_are_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a product were one of 10-bit significands instead of three."""

    def tf32(x: Tensor) -> Tensor:
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def rounded(A: Tensor, B: Tensor | None = None, **options: Any) -> Symmetric:
        return sym_matmul(tf32(A), tf32(A if B is None else B), **options)

    X = with_spectrum(48, 96, spectrum("k^-1/2", 48)).float()
    G = X @ X.mT
    assert int(matrix_function(G, torch.log1p).status) == 0
    for module in (matrix_function.__module__, polar.__module__):
        monkeypatch.setattr(sys.modules[module], "sym_matmul", rounded)
        monkeypatch.setattr(sys.modules[module], "product", lambda A, B: product(tf32(A), tf32(B)))
    found = matrix_function(G, torch.log1p)
    assert int(found.status) == INACCURATE
    assert not found.M.any() and not found.h.any()


@ALL
@pytest.mark.parametrize("relative_floor", [1e-4, 0.3, 30.0])
def test_a_floor_over_the_cutoff_is_the_damping(relative_floor: float, name: str) -> None:
    """At any ratio to the largest singular value, even for a matrix of noise only."""
    X = torch.stack([with_spectrum(20, 40, spectrum("k^-1", 20), i) for i in range(2)])
    X[1] *= 1e3
    floor = torch.linalg.matrix_norm(X, 2) * relative_floor
    floor[1] = 0
    plain = matrix_function(X @ X.mT, RESPONSES[name])
    found = matrix_function(X @ X.mT, RESPONSES[name], floor=floor)
    torch.testing.assert_close(found.tau, torch.maximum(plain.tau, floor))
    assert found.status.tolist() == [0, 0]
    torch.testing.assert_close(found.M[1], plain.M[1], rtol=0, atol=0)
    M, h = literal(X[0], RESPONSES[name], found.tau[0])
    g_max = RESPONSES[name]((X[0].norm() ** 2 + found.tau[0] ** 2).sqrt()).abs().item()
    tolerance = (1e-4 + 1e-9) * max(g_max, 1)
    assert torch.linalg.matrix_norm(found.M[0] - M, 2) <= tolerance
    assert torch.linalg.matrix_norm(found.h[0] - h, 2) * found.tau[0].square() <= tolerance


def test_a_floor_that_is_no_number_is_flagged_and_a_negative_one_is_none() -> None:
    X = torch.stack([with_spectrum(8, 12, spectrum("flat", 8), i).float() for i in range(3)])
    G = X @ X.mT
    clean = matrix_function(G, torch.sqrt)
    floor = torch.tensor([torch.nan, torch.inf, -9.0], device=DEVICE)
    found = matrix_function(G, torch.sqrt, floor=floor)
    assert (found.status != 0).tolist() == [True, True, False]
    assert not found.M[:2].any() and not found.h[:2].any()
    assert torch.equal(found.M[2], clean.M[2]) and torch.equal(found.tau[2], clean.tau[2])


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)], ids=str)
def test_any_number_of_batch_dimensions(batch: tuple[int, ...]) -> None:
    X = with_spectrum(6, 8, spectrum("k^-1", 6)).expand(*batch, 6, 8)
    floor = torch.full(batch, 0.1, device=DEVICE)
    found = matrix_function(X @ X.mT, torch.sqrt, floor=floor)
    assert found.M.shape == found.h.shape == (*batch, 6, 6)
    assert found.tau.shape == found.status.shape == batch and found.residuals.shape == (*batch, 2)
    assert not found.status.any()


@pytest.mark.parametrize("name", ["s^0.5", "s", "log_1", "log_2"])
def test_zero_and_rank_one_are_finite(name: str) -> None:
    rank_one = torch.ones(6, 6, device=DEVICE)
    G = torch.stack([0 * rank_one, rank_one])
    found = matrix_function(G, RESPONSES[name])
    assert found.status.tolist() == [0, 0]
    assert found.M.isfinite().all() and found.h.isfinite().all()
    assert found.M[0].abs().max() <= 1e-4


def test_kernels_do_every_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA each op is its kernel: the same numbers, and no product of PyTorch's."""
    X = with_spectrum(20, 30, spectrum("k^-1", 20)).float()
    products: list[str] = []  # PyTorch's own, below float64

    def see(operator: Any, args: Any) -> None:
        named = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot"} & {*str(operator).split(".")}
        if named and args[0].dtype != torch.float64:
            products.extend(named)

    with Operators(see):
        G = X @ X.mT
    assert products == ["mm"]

    def work() -> list[Tensor]:
        filtered = matrix_function(G, torch.log1p, cutoff=0.05)
        assert not filtered.status.any()
        return [filtered.M, filtered.h, polar(X)]

    expected = work()
    for op in ("sym_matmul", "product"):
        module = sys.modules[f"rdm_kernels.{op}"]  # the name in the package is the function
        monkeypatch.setattr(module, f"{op}_op", getattr(module, f"{op}_triton"))
    with Operators(see):
        found = work()
    assert products == ["mm"]
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) <= 1e-4
