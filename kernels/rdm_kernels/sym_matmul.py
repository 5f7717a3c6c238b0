"""Products of symmetric matrices that commute, as the terms of a matrix polynomial do.

    C = alpha A B + beta A + gamma I,   A B = B A;   B = A if left out

C is symmetric, so only tiles at or under its diagonal are computed; it equals its transpose bit for
bit, which keeps rounding from growing along a chain of products. Trace, Frobenius norm and a flag
of what is not finite come with it.

Error of an element, in units of |alpha| |A_i| |B_j| (rows), n terms summed, u = 2^-24; adding the
other two terms rounds the result by 3 u more:

    "tf32x3"    (n + 2) u + 12 u    three products of 10-bit significands on tensor cores
    "tf32"      (n + 2) u + 2^-10   one; too little for gradients through small eigenvalues

The op `rdm::sym_matmul` is *defined* by its PyTorch body below, in float32 whatever the precision.
Triton registers itself as that op's CUDA kernel; the kernels are in tiles.py.
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
    empty,
    finish_variant,
    padded,
    parts,
    product_variant,
    symmetric_product,
)
from rdm_kernels.variant import Variant

PRECISIONS = ("tf32x3", "tf32")


def sym_matmul(
    A: Tensor,
    B: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    precision: Literal["tf32x3", "tf32"] = "tf32x3",
) -> Symmetric:
    """alpha A B + beta A + gamma I of symmetric matrices that commute.

    Args:
        A: [v, n, n] float32, symmetric. Takes no gradient.
        B: as A, commuting with it; A if left out. Neither property is checked: what comes out
            is the lower triangle of the formula with B^T for B, mirrored.
        alpha, beta, gamma: numbers. beta = 0 still spreads a NaN of A.
        precision: how products are formed on CUDA.

    Returns:
        The matrices [v, n, n] with diagonal, trace, Frobenius norm and flag.

    Raises:
        ValueError: A or B is not a non-empty [v, n, n] float32 tensor, or precision is unknown.
    """
    B = A if B is None else B
    square = A.ndim == 3 and A.shape[1] == A.shape[2] and A.numel() > 0
    if not square or B.shape != A.shape or {A.dtype, B.dtype} != {torch.float32}:
        raise ValueError(
            "sym_matmul needs non-empty [v, n, n] float32 tensors of one shape, "
            f"got A {A.dtype} {tuple(A.shape)} and B {B.dtype} {tuple(B.shape)}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f'sym_matmul knows precision "tf32x3" and "tf32", got {precision!r}')
    with torch.autocast(A.device.type, enabled=False):
        return Symmetric(*sym_matmul_op(A.detach(), B.detach(), alpha, beta, gamma, precision))


# ---- the op, defined by its body -------------------------------------------------------------


@torch.library.custom_op("rdm::sym_matmul", mutates_args=())
def sym_matmul_op(
    A: Tensor, B: Tensor, alpha: float, beta: float, gamma: float, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Symmetric`."""
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return defined(alpha * (A @ B.mT) + beta * A + gamma * identity)


@sym_matmul_op.register_fake
def _(
    A: Tensor, B: Tensor, alpha: float, beta: float, gamma: float, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty(A, A.shape[0], A.shape[1])


# ---- block sizes and launchers -----------------------------------------------------------------


def blocks(n: int) -> Blocks:
    """Block sizes for n x n matrices."""
    return Blocks(128, 16, 8, 3) if n >= LARGE else Blocks(64, 32, 8, 3)


@sym_matmul_op.register_kernel("cuda")
def sym_matmul_triton(
    A: Tensor, B: Tensor, alpha: float, beta: float, gamma: float, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    v, n, _ = A.shape
    block = blocks(n)
    return launch(A, B, alpha, beta, gamma, precision, block, parts(v, n, n, block))


def launch(
    A: Tensor,
    B: Tensor,
    alpha: float,
    beta: float,
    gamma: float,
    precision: str,
    block: Blocks,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op by its kernels, with these block sizes, summed in at most so many parts."""
    X = padded(A)
    Y = X if B is A else padded(B)
    affine = (A.contiguous(), alpha, beta, gamma)
    out = symmetric_product(
        X, Y, A.shape[1], precision=precision, block=block, parts=parts, affine=affine
    )
    return out


def variants() -> list[Variant]:
    """Of every product that `blocks` may choose."""
    found = []
    for block in (blocks(LARGE - 1), blocks(LARGE)):
        for precision in PRECISIONS:
            found.append(product_variant(FP32, precision, block, features=False, centre=False))
        found.append(finish_variant(block, affine=True))
    return found
