"""Eigendecomposition of symmetric matrices that survives mixed precision.

    A = V diag(lambda) V^T

`torch.linalg.eigh` refuses 16-bit inputs, reads one triangle and ignores the other, raises where
one matrix of a batch is not finite, returns eigenvectors of either sign, and its gradient is
infinite for repeated eigenvalues. Here every floating dtype is taken, and autocast changes
nothing; A is made symmetric and scaled by a power of two before it is solved, so that entries of
1e-30 or 1e30 neither vanish nor overflow; a matrix that is not finite is flagged.

Precision. The solve is in float64: on a CPU, and on a GPU with full-rate float64, it costs less
than twice a float32 solve and resolves eigenvalues of 1e-15 lambda_max. On other GPUs (compute
capability other than x.0) float64 is 32 to 64 times slower, so there inputs of at most 32 bits are
solved in float32; eigenvalues are then refined to Rayleigh quotients v^T A v / v^T v in float64,
whose error is eps^2 / gap (the square of that of v, times the gap), at most eps, eps of float32.

Gradient. With S = V^T dL/dV and F_ij = 1 / (lambda_j - lambda_i),

    dL/dA = V (diag(dL/dlambda) + F o S) V^T, made symmetric,

and F_ij = 0 where the gap is too small to be resolved (below n eps max |lambda|). It is exact for
functions of the matrix on simple eigenvalues, and on repeated ones as long as they treat a
cluster alike and flat (spectral projectors, lambda^2 summed). f(A) with f' != 0 on a cluster
needs what lambda and V no longer know: use `rdm_kernels.matrix_power` and its kin, which are exact.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDE = torch.float64
TIE = 2.0**-20  # components this near the largest one are as large, whatever rounding says


class Eigh(NamedTuple):
    """Eigendecomposition of matrices A [..., n, n]; where one is not finite, it is flagged."""

    eigenvalues: Tensor  # [..., n], ascending; NaN if not finite
    vectors: Tensor  # [..., n, n], one a column, its largest component positive
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
        A: symmetric matrices, [..., n, n], n at least 1, any floating dtype; what is decomposed
            is (A + A^T) / 2. Takes a gradient, finite for repeated eigenvalues (see the module).
        cutoff: eigenvalues up to cutoff * max |lambda| are counted as zero in the rank. None for
            what the dtype of A can resolve: see `default_cutoff`.
        non_negative: A is known to be positive semi-definite, as a Gram matrix is: eigenvalues
            under zero are rounding and become zero.
        solve: float64 or float32, the dtype of the solver; None for the module's rule.

    Returns:
        Eigh, in A's dtype but at least float32. Vectors: the largest component of each (the first,
        if several are as large) is positive. Of the matrix as given, lambda is within
        n eps lambda_max, eps of float64, before it is rounded to the result's dtype. A matrix with
        an element that is not finite, or one on which the solver did not converge, has eigenvalues
        NaN, the identity for vectors, rank 0, finite False and a gradient of zero; the others
        of the batch are not touched.

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
    """Raise ValueError, in name's words, unless A is a stack of square floating matrices."""
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.shape[-1] == 0 or not A.is_floating_point():
        raise ValueError(
            f"{name} needs symmetric matrices [..., n, n] of a floating dtype, n at least 1, "
            f"got {A.dtype} {tuple(A.shape)}"
        )


def solves_narrow(A: Tensor) -> bool:
    """Whether the rule above solves A in float32: a GPU whose float64 is slow, and no float64 A."""
    return A.dtype != WIDE and not has_fast_float64(A.device)


def has_fast_float64(device: torch.device) -> bool:
    """Whether float64 has at least half the rate of float32: CPUs, and GPUs of capability x.0."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[1] == 0


def default_cutoff(A: Tensor, narrow: bool) -> float:
    """Relative size under which an eigenvalue of A [..., n, n] may be nothing but rounding.

    u sqrt(n) for the entries of A, as |E|_2 <= |E|_F <= u |A|_F <= u sqrt(n) lambda_max for a
    relative error u in each; and n eps for the solver.
    """
    n = A.shape[-1]
    solver = torch.finfo(torch.float32 if narrow else WIDE).eps
    return math.sqrt(n) * torch.finfo(A.dtype).eps / 2 + n * solver


def is_kept(eigenvalues: Tensor, cutoff: float) -> Tensor:
    """Which eigenvalues [..., n] lie over cutoff * the largest one; none of a zero matrix."""
    return eigenvalues > cutoff * eigenvalues.amax(dim=-1, keepdim=True).clamp_min(0)


# ---- the op, defined by its body -----------------------------------------------------------------


def wide_eigh(A: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., n], ascending, and vectors [..., n, n] of (A + A^T) / 2, in float64.

    All products here and in the gradient are of float64, which autocast never casts.
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
    """torch.linalg.eigh; NaN and the identity for a matrix on which it does not converge."""
    try:
        eigenvalues, vectors = torch.linalg.eigh(A)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if A.ndim > 2:
            parts = [_solve(matrix) for matrix in A]
            return torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])
        eigenvalues, vectors = torch.full_like(A[0], torch.nan), torch.eye(len(A)).to(A)
    return eigenvalues, vectors


def _refine(A: Tensor, eigenvalues: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients in float64 of float32 vectors, ascending, and the vectors normalized."""
    vectors = vectors.to(WIDE)
    vectors = vectors / vectors.norm(dim=-2, keepdim=True)
    quotients = (vectors * (A @ vectors)).sum(dim=-2)
    eigenvalues, order = quotients.where(eigenvalues.isfinite(), torch.nan).sort(dim=-1)
    return eigenvalues, vectors.gather(-1, order[..., None, :].expand_as(vectors))


def _fix_signs(vectors: Tensor) -> Tensor:
    """Columns with their largest component positive; the first of several that are as large."""
    size = vectors.abs()
    is_largest = size >= (1 - TIE) * size.amax(dim=-2, keepdim=True)
    first = is_largest.to(torch.int8).argmax(dim=-2, keepdim=True)
    return vectors * torch.where(vectors.gather(-2, first) < 0, -1.0, 1.0).to(vectors.dtype)


@torch.library.custom_op("rdm::safe_eigh", mutates_args=())
def eigh_op(A: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors in float64, solved in float32 if narrow."""
    return wide_eigh(A, narrow)


@eigh_op.register_fake
def _(A: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape[:-1], dtype=WIDE), A.new_empty(A.shape, dtype=WIDE)


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
    """V inner V^T, made symmetric: a gradient for A. Zero where A was not finite."""
    outer = V @ inner @ V.mT
    finite = eigenvalues.isfinite().all(dim=-1)[..., None, None]
    return ((outer + outer.mT) / 2).where(finite, 0)


eigh_op.register_autograd(_backward, setup_context=_save)
