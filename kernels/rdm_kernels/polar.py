"""Orthogonal polar factor by matrix products alone: U V^T of X = U S V^T.

Polar Express (arXiv:2505.16932) divides X by a bound on its largest singular value and iterates

    X <- P_k X,   P_k = a_k I + b_k R + c_k R^2,   R = X X^T

which applies the odd quintic p_k(s) = a_k s + b_k s^3 + c_k s^5 to every singular value s. Each p_k
is the best approximation of 1 on the interval [l, u] that holds the singular values by then. Its
error E is reached at four points of that interval with alternating sign, so the next interval is
[1 - E, 1 + E]. `schedule` finds p_k by Remez exchange; its two inner points are roots of a
quadratic.

Safety. Every p_k but the last is applied to s / 1.02 and designed for [l / 1.02, u], so singular
values that rounding lifts above u stay inside. Without this, p_k, which falls steeply past u, turns
rounding in tf32 into overflow within a few iterations.

Normalization. G = X X^T has lambda_max <= c = |G^2|_F^(1/2) <= n^(1/4) lambda_max, where the first
bound is nearly tight for a decaying spectrum. X is divided by sqrt(c): one product, no iteration.

All products are those of `sym_matmul` and `product`. Nothing waits for the device.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rdm_kernels.ops import describe
from rdm_kernels.product import product
from rdm_kernels.sym_matmul import sym_matmul

SAFETY = 1.02
NARROW = 1.05  # u / l below which Newton-Schulz is as good and Remez ill-conditioned


@torch.no_grad()
def polar(X: Tensor, *, lower: float = 3e-4, iterations: int = 7) -> Tensor:
    """Orthonormal rows (or columns, if there are fewer) nearest to X; no gradient flows through it.

    Args:
        X: [..., B, D], not empty, any floating dtype and scale. float64 is computed in float64, all
            other dtypes in float32.
        lower: singular values of at least lower * sqrt(c), c as above, become 1 within
            `schedule(lower, iterations).error`. Smaller ones land between 0 and 1 plus that error,
            in the same order.
        iterations: of 3 products each.

    Returns:
        [..., B, D] in X's dtype but at least float32. 7 iterations from 3e-4 come within 5e-4 of
        the exact factor. Rounding adds at most u / lower, u of float32 (2e-4; measured: 4e-5),
        however well conditioned X is, because an iteration sends some singular values to the lower
        end of the next interval, where they are amplified. Zero for X = 0, not finite where X is
        not.

    Raises:
        ValueError: lower is not in (0, 1), iterations is not positive, or X is not a matrix.
    """
    if X.ndim < 2 or not X.numel() or not X.is_floating_point():
        raise ValueError(f"polar needs non-empty floating X [..., B, D], got {describe(X=X)}")
    steps = schedule(lower, iterations).coefficients
    with torch.autocast(X.device.type, enabled=False):
        Q = X.to(torch.promote_types(X.dtype, torch.float32)).reshape(-1, *X.shape[-2:])
        Q = Q / power_of_four(Q)
        is_tall = Q.shape[1] > Q.shape[2]
        Q = Q.mT if is_tall else Q
        G = sym_matmul(Q).matrix
        c = bound(G)
        Q = iterate(Q / c.sqrt(), steps, G / c)
        return (Q.mT if is_tall else Q).reshape(X.shape).contiguous()


def power_of_four(X: Tensor) -> Tensor:
    """A power of four above each matrix's largest element, [..., 1, 1]; 1 for a zero matrix."""
    absmax = X.abs().amax(dim=(-2, -1), keepdim=True)
    _, exponent = torch.frexp(absmax)
    exponent = torch.div(exponent + 1, 2, rounding_mode="floor") * 2
    limit = -math.frexp(torch.finfo(X.dtype).smallest_normal)[1] - 2
    scale = torch.exp2(exponent.clamp(-limit, limit).to(X.dtype))
    return torch.where(absmax > 0, scale.where(absmax.isfinite(), absmax), 1)


def bound(G: Tensor) -> Tensor:
    """c = |G^2|_F^(1/2) >= lambda_max of symmetric G [v, n, n], as [v, 1, 1]; 1 for zeros."""
    c = sym_matmul(G).norm.sqrt()[:, None, None]
    return c.where(c != 0, 1)


def iterate(X: Tensor, steps: tuple[tuple[float, float, float], ...], R: Tensor) -> Tensor:
    """Apply the quintics to X [v, n, m], n <= m, with singular values at most 1 and R = X X^T."""
    for k, (a, b, c) in enumerate(steps):
        R = sym_matmul(X).matrix if k else R
        P = sym_matmul(R, alpha=c, beta=b, gamma=a).matrix
        X = product(P, X)
    return X


# ---- the schedule ------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """A composition of odd quintics, by their coefficients, and its error on [lower, 1]."""

    coefficients: tuple[tuple[float, float, float], ...]
    error: float  # the composition maps [lower, 1] into [1 - error, 1 + error]


@cache
def schedule(lower: float, iterations: int) -> Schedule:
    """Quintics p_k(s) = a s + b s^3 + c s^5, each the best on the image of the one before it.

    Raises:
        ValueError: lower is not in (0, 1), or iterations is not positive.
    """
    if not 0 < lower < 1 or iterations < 1:
        raise ValueError(
            "a polar schedule needs lower in (0, 1) and at least one iteration, "
            f"got lower={lower} and iterations={iterations}"
        )
    coefficients = []
    l, u, E = lower, 1.0, 1.0
    for k in range(iterations):
        safety = SAFETY if k < iterations - 1 else 1.0
        (a, b, c), E = _best_quintic(l / safety, u)
        coefficients.append((a / safety, b / safety**3, c / safety**5))
        l, u = 1 - E, 1 + E
    return Schedule(tuple(coefficients), E)


@cache
def iterations_for(lower: float, error: float) -> int:
    """Smallest number of iterations whose schedule has at most this error."""
    return next(k for k in range(1, 60) if schedule(lower, k).error <= error)


def _best_quintic(l: float, u: float) -> tuple[tuple[float, float, float], float]:
    """The odd quintic nearest to 1 on [l, u], and its error there."""
    if u / l < NARROW:
        m = (l + u) / 2
        a, b, c = 15 / (8 * m), -10 / (8 * m**3), 3 / (8 * m**5)
        return (a, b, c), max(abs(1 - (a * s + b * s**3 + c * s**5)) for s in (l, u))
    q, r = (3 * l + u) / 4, (l + 3 * u) / 4
    for _ in range(100):
        s = np.array([l, q, r, u])
        system = np.stack([s, s**3, s**5, [1, -1, 1, -1]], axis=1)
        a, b, c, E = (float(x) for x in np.linalg.solve(system, np.ones(4)))
        root = math.sqrt(9 * b * b - 20 * a * c)  # of p'(s) = a + 3 b s^2 + 5 c s^4
        before = q
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
        if abs(q - before) <= 1e-9 * q:  # E is flat in q and r
            break
    return (a, b, c), abs(E)
