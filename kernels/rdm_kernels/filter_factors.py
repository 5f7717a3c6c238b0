"""A spectral filter by matrix products alone: no factorization, no solve, no eigensolver.

For a batch X with singular values s and a response g, the filter is damped by tau (a hard cutoff
would need eigenvalues):

    W = V g(t) (s / t)^2 V^T,   t = sqrt(s^2 + tau^2)

Normalization. With G = X X^T, c = |G^2|_F^(1/2) >= s_max^2 and the rounding noise of X,

    C = max((1 + cutoff^2) c, noise^2 / d),   d = cutoff^2 / (1 + cutoff^2),   tau^2 = d C

From here on X, s and t are divided by sqrt(C). Then t lies in [sqrt d, 1] for any batch, and every
constant below is known before it. tau is the larger of cutoff sqrt(c) and the noise.

Iteration. Odd quintics x p_k(x^2) lift t to nearly 1: x_0 = t, x_(k+1) = x_k p_k(x_k^2). The
symmetric matrices below commute, and R_k has the eigenvalues x_k^2:

    R_0 = G + d,   P_k = p_k(R_k),   T_k = P_k R_k,   R_(k+1) = T_k P_k,   Q = ... P_1 P_0

Q has the eigenvalues x / t, x the last x_k. So with Y = Q X and K = Y Y^T, exactly,

    W = Y^T F Y,   X W = sqrt(C) K E Y,   F = (g / x^2)(t),   E = (t g / x^3)(t)

whatever the quintics are. As x is nearly 1, the rows of Y are well conditioned and F and E are no
larger than g and t g. Both are *linear combinations of the R_k, P_k, T_k and partial products Q*,
which resolve t on every scale between cutoff and 1, so a function of t costs no product. Their
weights are least squares over t. This needs gentle quintics, which never send a lifted value far
down again (those of Polar Express do, and their matrices oscillate).

After RESTART steps Y = Q X and R = Y Y^T + d Q^2 are formed from X again, which removes most of
what rounding did to a steep spectrum. In the end K + d Q^2 has the eigenvalues x^2, so its distance
from the identity shows whether the products were accurate enough.

The E that is returned includes sqrt(C), so rows y = X W have the coordinates alpha = K E in Y, and
with beta = alpha K and the inner products gamma = Z Y^T of target rows,

    |y_i|^2 = <alpha_i, beta_i>   <y_i, z_i> = <alpha_i, gamma_i>   dL/dX = N Y

N is that of `rdm_kernels.filtered_cosine` with R = F.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rdm_kernels.filter_steps import INACCURATE, combine, start
from rdm_kernels.gram import gram
from rdm_kernels.ops import describe
from rdm_kernels.product import product
from rdm_kernels.sym_matmul import sym_matmul

Response = Callable[[Tensor], Tensor]

LIFT = (3.3638340748422202, -6.5147620929545909, 4.1509280181123707)
"""(a, b, c) of a + b x^2 + c x^4: the steepest quintic that sends what it lifts into [0.7, 1]."""
QUINTICS = (
    *[LIFT] * 5,
    (2.2455062203165848, -2.0955575981400822, 0.85352186064528379),  # nearest to 1 on [0.7, 1],
    (1.8750127030416139, -1.2500141144155614, 0.37500141144194654),  # and on what that one leaves
)
RESTART = 5
NODES = 200
RIDGE = 3e-5  # keeps the weights, and so what they make of rounding, small


class FilterFactors(NamedTuple):
    """W = Y^T F Y and X W = K E Y for rows X, of which there are fewer than columns."""

    Y: Tensor  # [v, n, m], rows of nearly equal length along every direction that is not damped
    K: Tensor  # [v, n, n], Y Y^T
    F: Tensor  # [v, n, n], symmetric, as K and E are; K F is W of the other side
    E: Tensor  # [v, n, n]
    root: Tensor  # [v], sqrt(C); tau is sqrt(d) times as much
    trace: Tensor  # [v], |X|_F^2
    residual: Tensor  # [v], |K + d Q^2 - I|_F / sqrt(n)
    status: Tensor  # [v] int32: 0, NOT_FINITE (all else is NaN) or INACCURATE (Y, K, F, E are 0)


@torch.no_grad()
def filter_factors(
    X: Tensor, g: float | Response, *, cutoff: float = 1e-3, noise: float = 0.0
) -> FilterFactors:
    """Factors of the damped spectral filter of each batch X; nothing waits for the device.

    The first call for a cutoff, power and device copies constants to the device, so make one
    before you capture a CUDA graph.

    Args:
        X: [v, B, D], not empty, float16, bfloat16, float32 or float64. float64 is computed in
            float64, all other dtypes in float32. If B > D, the factors are those of X^T, with Y
            [v, D, B], and W = K F.
        g: the response. A number p stands for (s / sqrt(C))^p, -1 to 6: the scale is left out. A
            function maps singular values [v, k] float64 element by element, and must not wait for
            the device.
        cutoff: smallest tau / sqrt(c), in [1e-3, 0.1].
        noise: smallest tau / |X|_F.

    Returns:
        FilterFactors in X's dtype but at least float32. No gradient flows through it.

    Raises:
        ValueError: X is not [v, B, D] of a floating dtype, or cutoff or a power is out of range.
    """
    if X.ndim != 3 or not X.numel() or not X.is_floating_point():
        raise ValueError(
            f"filter_factors needs non-empty floating X [v, B, D], got {describe(X=X)}"
        )
    if not 1e-3 <= cutoff <= 0.1:
        raise ValueError(f"filter_factors needs a cutoff in [1e-3, 0.1], got {cutoff}")
    if not callable(g) and not -1 <= g <= 6:
        raise ValueError(f"filter_factors takes powers from -1 to 6, got {g}")
    X = X.detach()
    samples = X.shape[1] <= X.shape[2]
    d = damping(cutoff)
    with torch.autocast(X.device.type, enabled=False):
        if X.dtype == torch.float64:
            G = sym_matmul(X if samples else X.mT.contiguous()).matrix
        else:
            G = gram(X, side="samples" if samples else "features")
        trace = G.diagonal(dim1=1, dim2=2).sum(dim=1)  # finite if, and only if, G is
        squared = sym_matmul(G, norm=True)
        Y, R, P, root = start(X, G, squared.matrix, squared.norm, trace, d, noise, QUINTICS[0])
        Y = Y if samples else Y.mT

        def restart(Q: Tensor) -> Tensor:
            nonlocal Y
            Y = product(Q, Y)
            return sym_matmul(Y, C=_times(Q, Q), beta=d).matrix

        matrices, first, last = chain(R, P, _times, _quintic, restart)
        Y = product(last, Y)
        K = sym_matmul(Y).matrix
        Q = _times(last, first)
        unit = len(K[0]) ** -0.5
        rest = sym_matmul(Q, C=K, alpha=d * unit, beta=unit, gamma=-unit).matrix
        residual = torch.linalg.vector_norm(rest, dim=(1, 2))
        weights = _weights(g, cutoff, root, len(X))
        F, E, status = combine(weights, matrices, root, residual, trace, residual_limit(cutoff))
        usable = (status != INACCURATE)[:, None, None]
        Y, K = Y.where(usable, 0), K.where(usable, 0)
    return FilterFactors(Y, K, F, E, root, trace, residual, status)


def damping(cutoff: float) -> float:
    """d: tau^2 in units of C."""
    return cutoff**2 / (1 + cutoff**2)


def chain(
    R: Any,
    P: Any,
    times: Callable[[Any, Any], Any],
    quintic: Callable[[Any, tuple[float, float, float]], Any],
    restart: Callable[[Any], Any] | None = None,
) -> tuple[list[Any], Any, Any]:
    """All R_k, P_k, T_k and partial products Q of commuting matrices, or of numbers.

    Args:
        R, P: R_0 and P_0.
        times: multiplies two of them.
        quintic: a + b R + c R^2 from R and (a, b, c).
        restart: gives R_RESTART from the Q of the steps before it; by default it is T P.

    Returns:
        The matrices in a fixed order, and the Q of the steps before the restart and after it.
    """
    matrices, Q, first = [R, P], P, P
    for k in range(1, len(QUINTICS)):
        T = times(P, R)
        R = restart(Q) if restart and k == RESTART else times(T, P)
        P = quintic(R, QUINTICS[k])
        matrices += [T, R, P]
        if k == RESTART:
            first, Q = Q, P
        else:
            Q = times(P, Q)
            matrices.append(Q)
    return matrices, first, Q


def _times(A: Tensor, B: Tensor) -> Tensor:
    return sym_matmul(A, B).matrix


def _quintic(R: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients
    return sym_matmul(R, alpha=c, beta=b, gamma=a).matrix


# ---- weights of the combinations ---------------------------------------------------------------


def lifted(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues at t [k] of the matrices of `chain`, [k, j], and x, [k]."""
    R = t**2
    numbers, first, last = chain(R, _polynomial(R, QUINTICS[0]), np.multiply, _polynomial)
    return np.stack(numbers, axis=1), t * first * last


def _polynomial(R: np.ndarray, coefficients: tuple[float, float, float]) -> np.ndarray:
    a, b, c = coefficients
    return a + b * R + c * R**2


@cache
def residual_limit(cutoff: float) -> float:
    """Largest residual of accurate products: x^2 differs from 1 by as much, and by rounding."""
    t = np.geomspace(math.sqrt(damping(cutoff)), 1, NODES)
    return float(1.05 - lifted(t)[1].min() ** 2)


@cache
def _fit(cutoff: float, falling: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes t [k], and the matrix [2, j, k] from g at the nodes to the weights of F and E.

    Least squares of the errors of W and X W, those of W relative to t^falling.
    """
    angle = np.pi * (np.arange(NODES) + 0.5) / NODES
    t = np.exp(math.log(0.97 * cutoff) * (1 - np.cos(angle)) / 2)
    columns, x = lifted(t)
    ridge = RIDGE * math.sqrt(NODES) * np.eye(columns.shape[1])
    fits = []
    for weight, target in ((x**2 * t**-falling, 1 / x**2), (x**3, t / x**3)):
        inverse = np.linalg.pinv(np.vstack([weight[:, None] * columns, ridge]))[:, :NODES]
        fits.append(inverse * weight * target)
    return t, np.stack(fits)


@cache
def _power_weights(
    power: float, cutoff: float, v: int, like: tuple[torch.dtype, torch.device]
) -> Tensor:
    """Weights of F and E for t^power, [v, 2, j]."""
    t, fit = _fit(cutoff, min(power, 0.0))
    return torch.from_numpy(fit @ t**power).to(like[1], like[0]).expand(v, -1, -1).contiguous()


@cache
def _function_fit(cutoff: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes [k] and the matrix [2 j, k], float64."""
    t, fit = _fit(cutoff, 0.0)
    return torch.from_numpy(t).to(device), torch.from_numpy(fit.reshape(-1, NODES)).to(device)


def _weights(g: float | Response, cutoff: float, root: Tensor, v: int) -> Tensor:
    """Weights of F and E, [v, 2, j], in the dtype of root."""
    if not callable(g):
        return _power_weights(float(g), cutoff, v, (root.dtype, root.device))
    nodes, fit = _function_fit(cutoff, root.device)
    return (g(root[:, None] * nodes) @ fit.mT).to(root.dtype).unflatten(1, (2, -1))
