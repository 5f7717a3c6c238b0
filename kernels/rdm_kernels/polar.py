"""Orthogonal polar factor by matrix products alone: U V^T of X = U S V^T.

Polar Express (arXiv:2505.16932): X is divided by a bound of its largest singular value, and then

    X <- P_k X,   P_k = a_k I + b_k R + c_k R^2,   R = X X^T

applies the odd quintic p_k(s) = a_k s + b_k s^3 + c_k s^5 to every singular value s. Each p_k is
the best approximation of 1 on the interval [l, u] that holds them by then, so its error E, largest
at four points of that interval with alternating sign, makes the next one [1 - E, 1 + E].
`schedule` solves for p_k by Remez exchange, in which the two inner points are roots of a quadratic.

Safety. Every p_k but the last is taken of s / 1.02 and designed for [l / 1.02, u]: singular values
that rounding lifts over u are then still inside. Without it p_k, which falls steeply past u, turns
rounding into overflow within a few iterations, in 16 bits and in tf32.

Normalizer. G = X X^T has lambda_max <= c = |G^2|_F^(1/2) <= n^(1/4) lambda_max, the first nearly
tight for a decaying spectrum. sqrt(c) is the bound: one product, no iteration, no wait.

All products are `sym_matmul`'s, `gram`'s and `product`'s, so on CUDA float32 and float16 are
multiplied by their kernels, and nothing reads PyTorch's global switches of precision. Nothing waits
for the device.
"""

import math
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rdm_kernels.gram import gram
from rdm_kernels.product import product
from rdm_kernels.sym_matmul import sym_matmul

PRECISIONS = ("tf32x3", "fp16")
SAFETY = 1.02
NARROW = 1.05  # u / l under which Newton-Schulz is as good, and Remez ill-conditioned


@torch.no_grad()
def polar(
    X: Tensor,
    *,
    lower: float = 3e-4,
    iterations: int = 7,
    precision: Literal["tf32x3", "fp16"] = "tf32x3",
) -> Tensor:
    """Orthonormal rows (or columns, if there are fewer) nearest to X; no gradient flows through it.

    Args:
        X: [..., B, D], none of the sizes 0, any floating dtype and scale.
        lower: singular values from lower * sqrt(c) up, c as above, become 1 within
            `schedule(lower, iterations).error`; smaller ones some number from 0 to 1 plus that,
            growing with them.
        iterations: of 3 products each.
        precision: "tf32x3", of float32 (X of float64 is computed in float64), or "fp16": X and P_k
            are rounded to float16 for each product, which is summed in float32; R and c stay in
            it. One pass of tensor cores at twice the rate, where tf32x3 makes three. For a target,
            which takes no gradient.

    Returns:
        [..., B, D] in X's dtype but at least float32. 7 iterations from 3e-4: within 5e-4 of the
        exact factor. Rounding adds up to u / lower, u of float32 (2e-4; measured: 4e-5), however
        well conditioned X is, as an iteration sends some singular values to the lower end of
        the next interval, to be amplified from there. Zero for X = 0, not finite where X is not.

        With "fp16", 7 iterations from 3e-4, the gradient of cosines to the result is off by
        (emulated on a CPU, shapes up to (512, 2048)): 6e-3 for spectra flat, k^-1/2, k^-1 and in
        clusters, smallest over largest singular value 2e-3 or more, where "tf32x3" is off by 5e-4;
        6e-3 to 1.3e-2 for rank 8 and noise at 1e-3 of the largest; 4e-2 at 4e-4. Directions under
        `lower` (k^-2, rank 8 without noise) differ between the two by 0.03 to 0.16 of the gradient:
        there float16 rounds X itself.

    Raises:
        ValueError: lower is not in (0, 1), iterations is not positive, X is not a matrix, or
            precision is unknown.
    """
    if X.ndim < 2 or not X.numel() or not X.is_floating_point():
        raise ValueError(
            f"polar needs non-empty floating X [..., B, D], got {X.dtype} {tuple(X.shape)}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f'polar knows precision "tf32x3" and "fp16", got {precision!r}')
    steps = schedule(lower, iterations).coefficients
    with torch.autocast(X.device.type, enabled=False):
        wide = torch.promote_types(X.dtype, torch.float32)
        narrow = torch.float16 if precision == "fp16" else wide
        Q = X.to(wide).reshape(-1, *X.shape[-2:])
        Q = (Q / power_of_two(Q)).to(narrow)
        is_tall = Q.shape[1] > Q.shape[2]
        Q = Q.mT if is_tall else Q
        G = _gram(Q)
        c = bound(G)
        Q = iterate((Q / c.sqrt()).to(narrow), steps, G / c)
        return (Q.mT if is_tall else Q).reshape(X.shape).to(wide).contiguous()


def power_of_two(X: Tensor) -> Tensor:
    """Power of four over each matrix's largest element, [..., 1, 1]; 1 for a matrix of zeros."""
    absmax = X.abs().amax(dim=(-2, -1), keepdim=True)
    _, exponent = torch.frexp(absmax)
    exponent = torch.div(exponent + 1, 2, rounding_mode="floor") * 2
    limit = -math.frexp(torch.finfo(X.dtype).smallest_normal)[1] - 2
    scale = torch.exp2(exponent.clamp(-limit, limit).to(X.dtype))
    return torch.where(absmax > 0, scale.where(absmax.isfinite(), absmax), 1)


def bound(G: Tensor) -> Tensor:
    """c = |G^2|_F^(1/2) >= lambda_max of symmetric G [v, n, n], [v, 1, 1]; 1 for zeros."""
    c = sym_matmul(G).norm.sqrt()[:, None, None]
    return c.where(c != 0, 1)


def iterate(X: Tensor, steps: tuple[tuple[float, float, float], ...], R: Tensor) -> Tensor:
    """The iterations above on X [v, n, m], n <= m, whose singular values are at most 1.

    R is X X^T of the start, which the caller has anyway. Of X in float16 it is float32.
    """
    precision: Literal["tf32x3", "tf32"] = "tf32" if X.dtype == torch.float16 else "tf32x3"
    for k, (a, b, c) in enumerate(steps):
        R = _gram(X) if k else R
        P = sym_matmul(R, alpha=c, beta=b, gamma=a, precision=precision).matrix
        X = product(P.to(X.dtype), X)
    return X


def _gram(X: Tensor) -> Tensor:
    """X X^T [v, n, n], at least float32."""
    if X.dtype == torch.float16:
        return gram(X, side="samples").matrix
    return sym_matmul(X).matrix


# ---- the schedule ------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """Coefficients of a composition of odd quintics, and what it makes of [lower, 1]."""

    coefficients: tuple[tuple[float, float, float], ...]
    error: float  # the composition maps [lower, 1] into [1 - error, 1 + error]


@cache
def schedule(lower: float, iterations: int) -> Schedule:
    """Quintics p_k(s) = a s + b s^3 + c s^5, each best on what the one before it leaves.

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
    """Fewest iterations whose schedule has at most this error."""
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
        root = math.sqrt(9 * b * b - 20 * a * c)  # of p'(s) = a + 3 b s^2 + 5 c s^4 = 0
        before = q
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
        if abs(q - before) <= 1e-9 * q:  # E is flat in q and r
            break
    return (a, b, c), abs(E)
