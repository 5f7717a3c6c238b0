"""Symmetric matrix products, such as those of symmetric matrices that commute.

    S = alpha A B^T + beta C + gamma I,   A B^T = B A^T;   B and C default to A

Examples are A A^T of any rows, the terms of a matrix polynomial (where B^T = B), and L Q^T of a
polar decomposition L = S Q. Only tiles on or below the diagonal are computed. S equals its
transpose bit for bit, so rounding does not grow along a chain of products. A product is one launch
where n and k are multiples of 16; others are padded. The Frobenius norm, on request, takes a second
one: with gamma = -1 or beta = -1 it is that of a residual.

Error of an element in float32: (k + 14) u |alpha| |A_i| |B_j| for rows A_i and B_j of k terms,
u = 2^-24, and 3 u of the sum of the magnitudes of all three terms. Products are formed by tf32x3,
three products of 10-bit significands on tensor cores.

`rdm::sym_matmul` is defined by its PyTorch body; the Triton kernels in tiles.py replace it on CUDA
for float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rdm_kernels.ops import cuda_launcher, define_op, describe
from rdm_kernels.tiles import (
    FULL,
    LARGEST,
    SMALLEST,
    Blocks,
    mirrored,
    pad_rows,
    symmetric_product,
    symmetric_variants,
)
from rdm_kernels.variant import FP32, Variant

DTYPES = (torch.float32, torch.float64)


class Symmetric(NamedTuple):
    """v symmetric matrices, bit for bit, in float32 or float64."""

    matrix: Tensor  # [v, n, n]
    norm: Tensor  # [v], or [0] if not asked: Frobenius, so no eigenvalue is larger


def sym_matmul(
    A: Tensor,
    B: Tensor | None = None,
    *,
    C: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    norm: bool = False,
) -> Symmetric:
    """alpha A B^T + beta C + gamma I where A B^T is symmetric.

    Args:
        A: [v, n, k] float32 or float64, not empty. Takes no gradient.
        B: as A, and A by default. The symmetry of A B^T is not checked: the result is the lower
            triangle of the formula, mirrored.
        C: symmetric, [v, n, n]. By default A, which must then be square unless beta is 0.
        alpha, beta, gamma: numbers. beta = 0 does not hide a NaN in a C that is given.
        norm: whether to compute the Frobenius norms.

    Returns:
        The matrices [v, n, n] and their norms [v], which are not finite where a matrix is not.

    Raises:
        ValueError: the shapes or dtypes of A, B and C do not fit.
    """
    B = A if B is None else B
    C = A if C is None and beta != 0 else C
    matrices = (A, B) if C is None else (A, B, C)
    fit = A.ndim == 3 and A.numel() > 0 and B.shape == A.shape
    fit = fit and (C is None or C.shape == (*A.shape[:2], A.shape[1]))
    if not fit or A.dtype not in DTYPES or len({X.dtype for X in matrices}) > 1:
        raise ValueError(
            "sym_matmul needs non-empty A and B [v, n, k] and C [v, n, n] of one dtype, float32 "
            f"or float64, got {describe(A=A, B=B, C=C)}"
        )
    C = None if C is None else C.detach()
    with torch.autocast(A.device.type, enabled=False):
        return Symmetric(*sym_matmul_op(A.detach(), B.detach(), C, alpha, beta, gamma, norm))


def define_sym_matmul(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, gamma: float, norm: bool
) -> tuple[Tensor, Tensor]:
    S = alpha * (A @ B.mT)
    S = S if C is None else S + beta * C
    S.diagonal(dim1=1, dim2=2).add_(gamma)
    S = mirrored(S)
    return S, frobenius(S) if norm else S.new_empty(0)


def frobenius(S: Tensor) -> Tensor:
    """Norms [v] that neither overflow nor vanish unless the values do."""
    m = S.abs().amax(dim=(1, 2)).clamp(SMALLEST, LARGEST)
    return m * (S / m[:, None, None]).square().sum(dim=(1, 2)).sqrt()


sym_matmul_op = define_op("sym_matmul", define_sym_matmul)


@cuda_launcher(sym_matmul_op)
def sym_matmul_triton(
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    norm: bool,
    block: Blocks = FULL,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`define_sym_matmul` by the kernels, in these blocks and at most so many parts of the sum."""
    if A.dtype == torch.float64:
        return define_sym_matmul(A, B, C, alpha, beta, gamma, norm)
    n, X = A.shape[1], pad_rows(A)
    Y = X if B is A else pad_rows(B)
    return symmetric_product(
        X, Y, n, block, parts, C=C, alpha=alpha, beta=beta, gamma=gamma, norm=norm
    )


def variants() -> list[Variant]:
    """Products with and without C and norm."""
    return symmetric_variants(FP32, "tf32x3", FULL, affine=True)
