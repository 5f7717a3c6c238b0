"""A spectral filter of a Gram matrix by Cholesky and matrix products, without an eigensolver.

For a batch X with G = X X^T and singular values s, and a response g, damped by tau (a hard cutoff
would need eigenvalues), the filter is W = X^T h X with

    h = g(sqrt(G + tau^2)) (G + tau^2)^-1,   M = G h = g(sqrt(G + tau^2)) - tau^2 h
    tau = max(cutoff sqrt(c), floor),   c = |G^2|_F^(1/2) >= lambda_max

so that X W = M X. With C = c + tau^2, A = (G + tau^2) / C has its spectrum in [tau^2 / C, 1]. Since
tau^2 / C grows with tau, that lies in [cutoff^2 / (1 + cutoff^2), 1] for any G and floor, so every
constant below is known before the batch:

    L = cholesky(A)
    Q = polar(L)                      iterations of `rdm_kernels.polar`, so L = H Q
    H = L Q^T = sqrt(A)
    g(sqrt(C) H) = sum_k a_k T_k(S)   Chebyshev series in S = H mapped to [-1, 1], a_k on the device
    h = A^-1 g(sqrt(C) H) / C         by Cholesky's two triangular solves

The series converges as rho^-k, rho = (1 + sqrt cutoff) / (1 - sqrt cutoff), and takes
2 sqrt(degree) products (Paterson and Stockmeyer 1973, in Chebyshev form). At cutoff 1e-3 there are
48 products in all, each by `sym_matmul` or `product`.

With the inner products O = Z X^T and the coefficients a and c of `rdm_kernels.filtered_cosine`,
y = M X, |y_i|^2 = (M G M)_ii, <y_i, z_i> = (M o O) summed over row i, and
dL/dX = (a O + c M G) h X.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rdm_kernels.ops import describe
from rdm_kernels.polar import bound, iterate, iterations_for, power_of_four, schedule
from rdm_kernels.product import product
from rdm_kernels.sym_matmul import sym_matmul

NOT_FINITE = 1  # these three are bits of the status word
CHOLESKY_FAILED = 2
INACCURATE = 4
RESIDUAL_LIMIT = 1e-4  # float32 leaves 1e-6 to 1e-5, tf32 over 1e-3
LOG_TOLERANCE = 1e-4  # largest error of log s at the default degree


class MatrixFunction(NamedTuple):
    """M = g(sqrt G) and h = M G^-1, both damped, for each G of the batch."""

    M: Tensor  # [..., n, n], symmetric; NaN if G is not finite, zero on other failures
    h: Tensor  # [..., n, n], symmetric; likewise
    tau: Tensor  # [...], the damping
    status: Tensor  # [...] int32: 0, or the sum of NOT_FINITE, CHOLESKY_FAILED and INACCURATE
    residuals: Tensor  # [..., 2]: |Q Q^T - I|_F / sqrt(n) and |H^2 - A|_F / |A|_F


@torch.no_grad()
def matrix_function(
    G: Tensor,
    g: Callable[[Tensor], Tensor],
    *,
    cutoff: float = 1e-3,
    floor: Tensor | None = None,
    degree: int | None = None,
) -> MatrixFunction:
    """M and h of damped Gram matrices for any smooth response g; nothing waits for the device.

    The first call for a cutoff, degree and device copies the constants of the series to the device,
    so make one before you capture a CUDA graph.

    Args:
        G: symmetric positive semi-definite, [..., n, n], not empty, any floating dtype and scale.
            float64 is computed in float64, all other dtypes in float32; g always in float64.
        g: the response, which maps singular values s [..., k] in [tau, sqrt(c + tau^2)] element by
            element. It must not wait for the device.
        cutoff: smallest tau / sqrt(c), in (0, 0.1]; at least 1e-4 in float32.
        floor: smallest tau, [...], in the unit of singular values and on G's device: the noise of
            the dtype of G's rows. None for 0.
        degree: of the Chebyshev series; 1 is exact for g linear in s. By default log s is within
            1e-4, and so are s^p (p >= 0), log(1 + s) and log(1 + s^2), relative to their maximum.

    Returns:
        MatrixFunction, in G's dtype but at least float32. No gradient flows through it.

    Raises:
        ValueError: G is not [..., n, n] of a floating dtype, floor does not fit it, or cutoff is
            out of range.
    """
    if G.ndim < 2 or G.shape[-1] != G.shape[-2] or not G.numel() or not G.is_floating_point():
        raise ValueError(
            f"matrix_function needs non-empty floating G [..., n, n], got {describe(G=G)}"
        )
    if floor is not None and (floor.shape != G.shape[:-2] or floor.device != G.device):
        raise ValueError(
            "matrix_function needs a floor for each matrix of G, on its device, got "
            f"{describe(G=G, floor=floor)} on {G.device} and {floor.device}"
        )
    if not 0 < cutoff <= 0.1:
        raise ValueError(f"matrix_function needs a cutoff in (0, 0.1], got {cutoff}")
    degree = default_degree(cutoff) if degree is None else degree
    with torch.autocast(G.device.type, enabled=False):
        batch, n = G.shape[:-2], G.shape[-1]
        G = G.to(torch.promote_types(G.dtype, torch.float32)).reshape(-1, n, n)
        finite = G.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
        identity = torch.eye(n, dtype=G.dtype, device=G.device)
        G = G.where(finite, identity)
        scale = power_of_four(G)  # whose root is exact
        G = G / scale
        c = bound(G)
        tau = cutoff * c.sqrt()
        if floor is not None:
            noise = floor.to(G.dtype).reshape(-1, 1, 1) / scale.sqrt()
            tau = torch.maximum(tau, noise.where(finite, 0))
        C = c + tau.square()
        damping = tau.square() / C

        A = G / C + damping * identity
        L, info = torch.linalg.cholesky_ex(A)
        lower = cutoff / 2  # rounding may take half of cutoff^2 = 1e-6 from A's spectrum
        steps = schedule(lower, iterations_for(lower, torch.finfo(G.dtype).eps)).coefficients
        Q = iterate(L, steps, A)
        H = sym_matmul(L, Q).matrix

        a, b = interval(cutoff)
        nodes, blocks = _series(a, b, degree, G.device)
        values = g((C.sqrt() * scale.sqrt())[..., 0].to(torch.float64) * nodes)
        coefficients = (blocks @ values[..., None, :, None]).squeeze(-1)
        S = (2 * H - (a + b) * identity) / (b - a)
        M0 = _evaluate(coefficients.to(G.dtype), S, identity)
        h = _divide(L, M0)
        M = M0 - damping * h

        residuals = torch.stack(
            [
                sym_matmul(Q, gamma=-1.0).norm / math.sqrt(n),
                sym_matmul(H, C=A, beta=-1.0).norm / torch.linalg.matrix_norm(A),
            ],
            dim=-1,
        )
        accurate = (residuals <= RESIDUAL_LIMIT).all(dim=-1)  # also false for NaN
        status = (
            NOT_FINITE * ~finite[:, 0, 0] + CHOLESKY_FAILED * (info != 0) + INACCURATE * ~accurate
        ).to(torch.int32)
        usable = (status == 0)[:, None, None]
        unusable = torch.where(finite, 0.0, torch.nan).to(M.dtype)
        return MatrixFunction(
            M.where(usable, unusable).reshape(*batch, n, n),
            (h / C / scale).where(usable, unusable).reshape(*batch, n, n),
            (tau * scale.sqrt()).reshape(batch),
            status.reshape(batch),
            residuals.reshape(*batch, 2),
        )


def _divide(L: Tensor, M0: Tensor) -> Tensor:
    """A^-1 M0 for A = L L^T, which commutes with M0."""
    # Unlike solve_triangular, cholesky_solve never rounds to tf32. One matrix a call is the same
    # code in every version of PyTorch.
    pairs = zip(M0.split(1), L.split(1), strict=True)
    h = torch.cat([torch.cholesky_solve(right, factor) for right, factor in pairs])
    return (h + h.mT) / 2


# ---- the Chebyshev series ------------------------------------------------------------------------


def interval(cutoff: float) -> tuple[float, float]:
    """Bounds of the spectrum of H, with room for rounding."""
    return 0.97 * cutoff / math.sqrt(1 + cutoff**2), 1.001


@cache
def default_degree(cutoff: float) -> int:
    """Smallest d with log s within LOG_TOLERANCE; its tail is at most 2 rho^-d / (d (rho - 1))."""
    a, b = interval(cutoff)
    rho = (1 + math.sqrt(a / b)) / (1 - math.sqrt(a / b))
    return next(d for d in range(1, 10_000) if 2 * rho**-d / (d * (rho - 1)) <= LOG_TOLERANCE)


@cache
def _series(a: float, b: float, degree: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes [k] in [a, b], and the matrix [J + 1, m, k] from g at the nodes to block coefficients.

    Interpolation at the k = 2 (degree + 1) Chebyshev nodes gives the a_j, sums of g cos(j angle).
    The blocks are those of sum_j a_j T_j = sum_J B_J(S) T_J(T_m(S)), B_J of degree below m, by
    T_(Jm + i) = 2 T_(Jm) T_i - T_(Jm - i), from the highest down.
    """
    k = 2 * (degree + 1)
    angle = np.pi * (np.arange(k) + 0.5) / k
    nodes = (a + b) / 2 + (b - a) / 2 * np.cos(angle)
    j = np.arange(degree + 1)
    series = np.cos(j[:, None] * angle) * 2 / k
    series[0] /= 2

    m = max(2, round(math.sqrt(degree + 1)))
    giant = degree // m
    padded = np.zeros(((giant + 1) * m, k))
    padded[: degree + 1] = series
    blocks = np.zeros((giant + 1, m, k))
    for J in range(giant, 0, -1):
        for i in range(m - 1, 0, -1):
            blocks[J, i] = 2 * padded[J * m + i]
            padded[J * m - i] -= padded[J * m + i]
        blocks[J, 0] = padded[J * m]
    blocks[0] = padded[:m]
    return torch.from_numpy(nodes).to(device), torch.from_numpy(blocks).to(device)


def _evaluate(coefficients: Tensor, S: Tensor, identity: Tensor) -> Tensor:
    """sum_J B_J(S) T_J(T_m(S)) by Clenshaw, for block coefficients [v, J + 1, m]."""
    giant, m = coefficients.shape[1] - 1, coefficients.shape[2]
    T = [identity.expand_as(S), S]
    for k in range(2, m + (giant > 0)):  # T_(i + j) = 2 T_i T_j - T_(i - j)
        i, j = (k + 1) // 2, k // 2
        T.append(sym_matmul(T[i], T[j], C=T[i - j], alpha=2.0, beta=-1.0).matrix)
    small = torch.stack(T[:m], dim=1)
    B = product(coefficients, small.flatten(2)).unflatten(2, S.shape[1:])

    after, result = torch.zeros_like(S), B[:, giant]
    for J in range(giant - 1, -1, -1):
        factor = 2.0 if J else 1.0
        rest = B[:, J] - after
        after, result = result, sym_matmul(T[m], result, C=rest, alpha=factor, beta=1.0).matrix
    return result
