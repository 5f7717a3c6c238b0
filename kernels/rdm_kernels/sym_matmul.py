"""Matrix products that are symmetric, as all are of symmetric matrices that commute.

    S = alpha A B^T + beta C + gamma I,   A B^T = B A^T;   B = A and C = A if left out

A A^T of any rows; terms of a matrix polynomial, since B^T = B there; L Q^T of a polar decomposition
L = S Q. Only tiles at or under the diagonal are computed. S equals its transpose bit for bit, which
keeps rounding from growing along a chain of products. Trace, Frobenius norm and a flag of what is
not finite come with it: with gamma = -1 or beta = -1, the norm of a residual.

Error of an element in float32, in units of |alpha| |A_i| |B_j| (rows), k terms summed, u = 2^-24;
adding the other two terms rounds the result by 3 u more:

    "tf32x3"    (k + 2) u + 12 u    three products of 10-bit significands on tensor cores
    "tf32"      (k + 2) u + 2^-10   one; too little for gradients through small eigenvalues

The op `rdm::sym_matmul` is *defined* by its PyTorch body below, in the dtype of A whatever the
precision. Triton registers itself as that op's CUDA kernel for float32; the kernels are in
tiles.py. float64 is computed by the body on every device.
"""

from typing import Literal

import torch
from torch import Tensor

from rdm_kernels.tiles import (
    FP32,
    LARGE,
    Blocks,
    Symmetric,
    defined,
    described,
    empty,
    finish_variant,
    padded,
    parts,
    product_variant,
    symmetric_product,
)
from rdm_kernels.variant import Variant

DTYPES = (torch.float32, torch.float64)
PRECISIONS = ("tf32x3", "tf32")


def sym_matmul(
    A: Tensor,
    B: Tensor | None = None,
    *,
    C: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    precision: Literal["tf32x3", "tf32"] = "tf32x3",
) -> Symmetric:
    """alpha A B^T + beta C + gamma I where A B^T is symmetric.

    Args:
        A: [v, n, k] float32 or float64. Takes no gradient.
        B: as A; A if left out. That A B^T is symmetric is not checked: what comes out is the
            lower triangle of the formula, mirrored.
        C: symmetric, [v, n, n]; A if left out, which is then square unless beta is 0.
        alpha, beta, gamma: numbers. beta = 0 does not stop a NaN of a C that is given.
        precision: how products of float32 are formed on CUDA.

    Returns:
        The matrices [v, n, n] with diagonal, trace, Frobenius norm and flag.

    Raises:
        ValueError: A or B is not a non-empty [v, n, k] tensor of float32 or float64, C is not
            [v, n, n], their dtypes differ, or precision is unknown.
    """
    B = A if B is None else B
    C = A if C is None and beta != 0 else C
    matrices = (A, B) if C is None else (A, B, C)
    fit = A.ndim == 3 and A.numel() > 0 and B.shape == A.shape
    fit = fit and (C is None or C.shape == (*A.shape[:2], A.shape[1]))
    if not fit or A.dtype not in DTYPES or len({X.dtype for X in matrices}) > 1:
        raise ValueError(
            "sym_matmul needs non-empty A and B [v, n, k] and C [v, n, n] of one dtype, float32 "
            f"or float64, got {described(A=A, B=B, C=C)}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f'sym_matmul knows precision "tf32x3" and "tf32", got {precision!r}')
    C = None if C is None else C.detach()
    with torch.autocast(A.device.type, enabled=False):
        return Symmetric(*sym_matmul_op(A.detach(), B.detach(), C, alpha, beta, gamma, precision))


# ---- the op, defined by its body -------------------------------------------------------------


@torch.library.custom_op("rdm::sym_matmul", mutates_args=())
def sym_matmul_op(
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Symmetric`."""
    return _body(A, B, C, alpha, beta, gamma)


def _body(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, gamma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    S = alpha * (A @ B.mT)
    S = S if C is None else S + beta * C
    S.diagonal(dim1=1, dim2=2).add_(gamma)
    return defined(S)


@sym_matmul_op.register_fake
def _(
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty(A, A.shape[0], A.shape[1])


# ---- block sizes and launchers -----------------------------------------------------------------


def blocks(n: int) -> Blocks:
    """Block sizes for n x n matrices."""
    return Blocks(128, 16, 8, 3) if n >= LARGE else Blocks(64, 32, 8, 3)


@sym_matmul_op.register_kernel("cuda")
def sym_matmul_triton(
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if A.dtype == torch.float64:
        return _body(A, B, C, alpha, beta, gamma)
    v, n, k = A.shape
    block = blocks(n)
    return launch(A, B, C, alpha, beta, gamma, precision, block, parts(v, n, k, block))


def launch(
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    precision: str,
    block: Blocks,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op by its kernels, with these block sizes, summed in at most so many parts."""
    X = padded(A)
    return symmetric_product(
        X,
        X if B is A else padded(B),
        A.shape[1],
        precision=precision,
        block=block,
        parts=parts,
        C=None if C is None else C.contiguous(),
        alpha=alpha,
        beta=beta,
        gamma=gamma,
    )


def variants() -> list[Variant]:
    """Of every product that `blocks` may choose."""
    found = []
    for block in (blocks(LARGE - 1), blocks(LARGE)):
        for precision in PRECISIONS:
            found.append(product_variant(FP32, precision, block, features=False, center=False))
        found += [finish_variant(block, affine) for affine in (False, True)]
    return found
