"""Powers, roots and logarithms of symmetric positive semi-definite matrices, with exact gradients.

    f(A) = V diag(f(lambda)) V^T over eigenvalues lambda > cutoff * lambda_max, 0 on the others

Eigenvalues up to the cutoff, including negative ones, are rounding noise and count as zero. So a
negative power is that of the pseudo-inverse, A^0 projects onto the range, and log A is taken on the
range. `matrix_log1p` is smooth at zero and has no cutoff.

The gradient is that of Daleckii and Krein (1965),

    dL/dA = V (Phi o (V^T dL/df V)) V^T,  Phi_ij = (f_i - f_j) / (lambda_i - lambda_j),  Phi_ii = f'

exact for simple, close and repeated eigenvalues, because Phi is formed without subtracting f: with
h >= l the shifted eigenvalues (lambda, or 1 + lambda for log1p), d = (l - h) / h, x = log1p d,

    power   Phi = h^(p-1) expm1(p x) / d    (p h^(p-1) at d = 0)
    log     Phi = x / (h d)                 (1 / h at d = 0)

Between a kept i and a cut-off j, Phi = f_i / (lambda_i - lambda_j); between two cut off, 0.

Error of each function, besides rounding to its dtype: n eps lambda_max max|Phi|, eps of float64, as
the solver is backward stable (`rdm_kernels.safe_eigh` also solves in float32 on some GPUs). Other
uses: whitening, C^-1/2; Shampoo-like preconditioners, L^-1/4.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rdm_kernels.ops import define_op
from rdm_kernels.safe_eigh import (
    check,
    default_cutoff,
    define_eigh,
    from_basis,
    is_kept,
    solves_narrow,
)


def matrix_power(A: Tensor, exponent: float, *, cutoff: float | None = None) -> Tensor:
    """A^exponent of symmetric positive semi-definite matrices, on A's range if exponent <= 0.

    Args:
        A: [..., n, n], any floating dtype and scale. Takes a gradient.
        exponent: any finite number.
        cutoff: eigenvalues up to cutoff * lambda_max count as zero. By default
            `rdm_kernels.safe_eigh.default_cutoff`, the smallest that A's dtype can resolve.

    Returns:
        [..., n, n] in A's dtype but at least float32, bitwise symmetric. Zero for a zero matrix,
        NaN (with a gradient of zero) for one that is not finite.

    Raises:
        ValueError: A is not [..., n, n] of a floating dtype.
    """
    return _apply(A, "power", exponent, cutoff)


def matrix_sqrt(A: Tensor, *, cutoff: float | None = None) -> Tensor:
    """A^1/2; arguments and result as `matrix_power`."""
    return _apply(A, "power", 0.5, cutoff)


def matrix_inverse_sqrt(A: Tensor, *, cutoff: float | None = None) -> Tensor:
    """A^-1/2 on the range of A, as `matrix_power`: the whitening matrix of a covariance."""
    return _apply(A, "power", -0.5, cutoff)


def matrix_log(A: Tensor, *, cutoff: float | None = None) -> Tensor:
    """log A on the range of A and 0 outside it; arguments and result as `matrix_power`."""
    return _apply(A, "log", 0.0, cutoff)


def matrix_log1p(A: Tensor) -> Tensor:
    """log(I + A), accurate for small A; arguments and result as `matrix_power`.

    There is no cutoff: small eigenvalues of either sign count. The result is not finite if an
    eigenvalue is -1 or less, outside the domain.
    """
    return _apply(A, "log1p", 0.0, 0.0)


def _apply(A: Tensor, kind: str, exponent: float, cutoff: float | None) -> Tensor:
    name = "matrix_" + kind
    check(A, name)
    narrow = solves_narrow(A)
    limit = default_cutoff(A, narrow) if cutoff is None else cutoff
    result, _, _ = eigh_function(A, kind, exponent, limit, narrow)
    return result.to(torch.promote_types(A.dtype, torch.float32))


# ---- the op, defined by its body -----------------------------------------------------------------


def define_eigh_function(
    A: Tensor, kind: str, exponent: float, cutoff: float, narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """f(A), eigenvalues and vectors in float64, for kind power, log or log1p."""
    eigenvalues, V = define_eigh(A, narrow)
    f = _response(eigenvalues, _kept(eigenvalues, kind, cutoff), kind, exponent)
    result = V * f[..., None, :] @ V.mT
    finite = eigenvalues.isfinite().all(dim=-1)[..., None, None]
    result = ((result + result.mT) / 2).where(finite, torch.nan)
    return result.contiguous(), eigenvalues, V


eigh_function = define_op("eigh_function", define_eigh_function)


def _kept(eigenvalues: Tensor, kind: str, cutoff: float) -> Tensor:
    """Mask of the eigenvalues that f applies to."""
    if kind == "log1p":
        return torch.ones_like(eigenvalues, dtype=torch.bool)
    return is_kept(eigenvalues, cutoff)


def _response(eigenvalues: Tensor, kept: Tensor, kind: str, exponent: float) -> Tensor:
    """f(lambda), or 0 where cut off."""
    if kind == "log1p":
        return eigenvalues.log1p()
    safe = eigenvalues.where(kept, 1)
    return (safe.log() if kind == "log" else safe**exponent).where(kept, 0)


def divided_differences(eigenvalues: Tensor, kept: Tensor, kind: str, exponent: float) -> Tensor:
    """Phi, [..., n, n], as defined above."""
    shift = 1 if kind == "log1p" else 0
    safe = eigenvalues.where(kept, 1)
    high = torch.maximum(safe[..., :, None], safe[..., None, :])
    low = torch.minimum(safe[..., :, None], safe[..., None, :])
    h, l = shift + high, shift + low
    d = (low - high) / h
    x = torch.where(d > -0.5, d.log1p(), (l / h).log())  # 1 + d has lost digits of a small l
    apart = d.where(d < 0, 1)
    if kind == "power":
        inside = h ** (exponent - 1) * torch.where(d < 0, (exponent * x).expm1() / apart, exponent)
    else:
        inside = torch.where(d < 0, x / apart, 1) / h

    f = _response(eigenvalues, kept, kind, exponent)
    one_kept = kept[..., :, None] ^ kept[..., None, :]
    gap = eigenvalues[..., :, None] - eigenvalues[..., None, :]
    across = (f[..., :, None] - f[..., None, :]) / gap.where(one_kept, 1)
    both_kept = kept[..., :, None] & kept[..., None, :]
    return torch.where(both_kept, inside, across.where(one_kept, 0))


def _save(ctx, inputs, output):
    A, ctx.kind, ctx.exponent, ctx.cutoff, _ = inputs
    ctx.dtype = A.dtype
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx, grad, _grad_eigenvalues, _grad_vectors):
    if grad is None:
        return (None,) * 5
    eigenvalues, V = ctx.saved_tensors
    kept = _kept(eigenvalues, ctx.kind, ctx.cutoff)
    phi = divided_differences(eigenvalues, kept, ctx.kind, ctx.exponent)
    inner = phi * (V.mT @ grad @ V)
    return from_basis(inner, eigenvalues, V).to(ctx.dtype), *(None,) * 4


eigh_function.register_autograd(_backward, setup_context=_save)
