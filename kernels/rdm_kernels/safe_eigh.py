"""Eigendecomposition of symmetric matrices that survives mixed precision.

    A = V diag(lambda) V^T

`torch.linalg.eigh` refuses 16-bit inputs, reads one triangle only, raises if one matrix of a batch
is not finite, returns eigenvectors of either sign, and has an infinite gradient for repeated
eigenvalues. This op takes every floating dtype and ignores autocast. It symmetrizes A and scales it
by a power of two, so that entries of 1e-30 or 1e30 neither vanish nor overflow, and flags matrices
that are not finite.

Precision. The solver runs in float64 on CPUs and on GPUs with fast float64, where it costs less
than twice a float32 solve and resolves eigenvalues of 1e-15 lambda_max. On other GPUs float64 is 32
to 64 times slower, so inputs of at most 32 bits are solved in float32. Their eigenvalues are then
refined to Rayleigh quotients v^T A v / v^T v in float64, with error eps^2 / gap (the square of v's
error, times the gap) and at most eps, eps of float32.

Gradient. With S = V^T dL/dV and F_ij = 1 / (lambda_j - lambda_i),

    dL/dA = V (diag(dL/dlambda) + F o S) V^T, made symmetric,

where F_ij = 0 if the gap cannot be resolved (below n eps max |lambda|). It is exact for functions
of the matrix on simple eigenvalues, and on repeated ones for functions that treat a cluster alike
and flat (spectral projectors, sums of lambda^2). f(A) with f' != 0 on a cluster needs what lambda
and V no longer hold: use `rdm_kernels.matrix_power` and its relatives, which are exact.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rdm_kernels.ops import define_op, describe

WIDE = torch.float64
TIE = 2.0**-20  # components this close to the largest one count as equally large
# Compute capabilities with float64 at half the rate of float32: P100, V100, A100, H100, B200.
FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


class Eigh(NamedTuple):
    """Eigendecomposition of matrices A [..., n, n]."""

    eigenvalues: Tensor  # [..., n], ascending; NaN if not finite
    vectors: Tensor  # [..., n, n], one per column, its largest component positive
    rank: Tensor  # [...] int64: eigenvalues with |lambda| > cutoff * max |lambda|
    finite: Tensor  # [...] bool


def safe_eigh(
    A: Tensor,
    *,
    cutoff: float | None = None,
    non_negative: bool = False,
    solve: torch.dtype | None = None,
) -> Eigh:
    """Eigenvalues and eigenvectors of symmetric matrices, of any dtype and any scale.

    Args:
        A: symmetric matrices, [..., n, n], n at least 1, any floating dtype; (A + A^T) / 2 is
            decomposed. Takes a gradient, finite for repeated eigenvalues (see the module).
        cutoff: eigenvalues up to cutoff * max |lambda| count as zero in the rank. By default
            `default_cutoff`, the smallest that A's dtype can resolve.
        non_negative: set if A is positive semi-definite, as a Gram matrix is: eigenvalues below
            zero are then rounding and become zero.
        solve: the solver's dtype, float64 or float32; None for the module's rule.

    Returns:
        Eigh, in A's dtype but at least float32. The largest component of each vector (the first, if
        several are equally large) is positive. Before rounding to the result's dtype, lambda is
        within n eps lambda_max of A's, eps of float64. A matrix that is not finite, or on which the
        solver does not converge, has eigenvalues NaN, the identity as vectors, rank 0, finite False
        and a gradient of zero; the others of the batch are unaffected.

    Raises:
        ValueError: A is not [..., n, n] of a floating dtype, or solve is another dtype.
    """
    check(A, "safe_eigh")
    if solve not in (None, torch.float32, torch.float64):
        raise ValueError(f"safe_eigh solves in torch.float32 or torch.float64, got {solve}")
    narrow = solves_narrow(A) if solve is None else solve == torch.float32
    eigenvalues, vectors = eigh_op(A, narrow)
    if non_negative:
        eigenvalues = eigenvalues.clamp_min(0)
    with torch.no_grad():
        finite = ~eigenvalues.isnan().any(dim=-1)
        limit = default_cutoff(A, narrow) if cutoff is None else cutoff
        rank = is_kept(eigenvalues.abs(), limit).sum(dim=-1)
    out = torch.promote_types(A.dtype, torch.float32)
    return Eigh(eigenvalues.to(out), vectors.to(out), rank, finite)


def check(A: Tensor, name: str) -> None:
    """Raise a ValueError in this function's name unless A is [..., n, n] of a floating dtype."""
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.shape[-1] == 0 or not A.is_floating_point():
        raise ValueError(
            f"{name} needs symmetric matrices A [..., n, n] of a floating dtype, n at least 1, "
            f"got {describe(A=A)}"
        )


def solves_narrow(A: Tensor) -> bool:
    """Whether the module's rule solves A in float32."""
    return A.dtype != WIDE and not has_fast_float64(A.device)


def has_fast_float64(device: torch.device) -> bool:
    """Whether float64 has at least half the rate of float32."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in FAST_FLOAT64


def default_cutoff(A: Tensor, narrow: bool) -> float:
    """Relative size below which an eigenvalue of A [..., n, n] may be rounding alone.

    The entries of A add u sqrt(n), as |E|_2 <= |E|_F <= u |A|_F <= u sqrt(n) lambda_max for a
    relative error u in each; the solver adds n eps.
    """
    n = A.shape[-1]
    solver = torch.finfo(torch.float32 if narrow else WIDE).eps
    return math.sqrt(n) * torch.finfo(A.dtype).eps / 2 + n * solver


def is_kept(eigenvalues: Tensor, cutoff: float) -> Tensor:
    """Mask of eigenvalues [..., n] above cutoff * the largest one; empty for a zero matrix."""
    return eigenvalues > cutoff * eigenvalues.amax(dim=-1, keepdim=True).clamp_min(0)


# ---- the op, defined by its body -----------------------------------------------------------------


def define_eigh(A: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., n], ascending, and vectors [..., n, n] of (A + A^T) / 2, in float64.

    The solver runs in float32 if narrow. All products, also those of the gradient, are in float64,
    which autocast never casts.
    """
    absmax = A.abs().amax(dim=(-2, -1)).to(WIDE)
    finite = absmax.isfinite()
    _, exponent = torch.frexp(absmax.where(finite, 1))
    scale = torch.exp2(exponent.clamp(-1000, 1000).to(WIDE))[..., None]
    A = A.to(WIDE) / scale[..., None]
    identity = torch.eye(A.shape[-1], dtype=WIDE, device=A.device)
    A = ((A + A.mT) / 2).where(finite[..., None, None], identity)
    eigenvalues, vectors = _solve(A.to(torch.float32) if narrow else A)
    if narrow:
        eigenvalues, vectors = _refine(A, eigenvalues, vectors)
    eigenvalues = (eigenvalues * scale).where(finite[..., None], torch.nan)
    return eigenvalues, _fix_signs(vectors).contiguous()


def _solve(A: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh, with NaN and the identity for a matrix on which it does not converge."""
    try:
        eigenvalues, vectors = torch.linalg.eigh(A)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if A.ndim > 2:
            parts = [_solve(matrix) for matrix in A]
            return torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])
        eigenvalues, vectors = torch.full_like(A[0], torch.nan), torch.eye(len(A)).to(A)
    return eigenvalues, vectors


def _refine(A: Tensor, eigenvalues: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients in float64, ascending, and normalized vectors of a float32 solve."""
    vectors = vectors.to(WIDE)
    vectors = vectors / vectors.norm(dim=-2, keepdim=True)
    quotients = (vectors * (A @ vectors)).sum(dim=-2)
    eigenvalues, order = quotients.where(eigenvalues.isfinite(), torch.nan).sort(dim=-1)
    return eigenvalues, vectors.gather(-1, order[..., None, :].expand_as(vectors))


def _fix_signs(vectors: Tensor) -> Tensor:
    """Flip columns so that the largest component, the first in a tie, is positive."""
    size = vectors.abs()
    is_largest = size >= (1 - TIE) * size.amax(dim=-2, keepdim=True)
    first = is_largest.to(torch.int8).argmax(dim=-2, keepdim=True)
    return vectors * torch.where(vectors.gather(-2, first) < 0, -1.0, 1.0).to(vectors.dtype)


eigh_op = define_op("safe_eigh", define_eigh)


def _save(ctx, inputs, output):
    A, narrow = inputs
    ctx.dtype = A.dtype
    ctx.eps = A.shape[-1] * torch.finfo(torch.float32 if narrow else WIDE).eps
    ctx.save_for_backward(*output)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx, grad_eigenvalues, grad_vectors):
    eigenvalues, V = ctx.saved_tensors
    inner = torch.zeros_like(V)
    if grad_vectors is not None:
        gap = eigenvalues[..., None, :] - eigenvalues[..., :, None]
        limit = ctx.eps * eigenvalues.abs().amax(dim=-1)[..., None, None]
        resolved = gap.abs() > limit
        inner = (V.mT @ grad_vectors / gap.where(resolved, 1)).where(resolved, 0)
    if grad_eigenvalues is not None:
        inner = inner + torch.diag_embed(grad_eigenvalues)
    return from_basis(inner, eigenvalues, V).to(ctx.dtype), None


def from_basis(inner: Tensor, eigenvalues: Tensor, V: Tensor) -> Tensor:
    """The gradient V inner V^T, made symmetric; zero where A was not finite."""
    outer = V @ inner @ V.mT
    finite = eigenvalues.isfinite().all(dim=-1)[..., None, None]
    return ((outer + outer.mT) / 2).where(finite, 0)


eigh_op.register_autograd(_backward, setup_context=_save)
