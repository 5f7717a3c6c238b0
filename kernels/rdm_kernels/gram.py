"""Gram matrices of batches of rows, in float32, equal to their transposes bit for bit.

    samples    G = X X^T [B, B]        features    G = X^T X [D, D]
    stacked    G = [X1; X2] [X1; X2]^T [2B, 2B]: X1 X1^T, X2 X2^T and X2 X1^T in one matrix

Products of 16-bit values are exact in float32, so the Gram matrix of a 16-bit batch is as accurate
as float32 sums, unless it is stored in 16 bits. With `center`, the mean row of each view is
subtracted as rows are read. Only tiles on or below the diagonal are computed, and mirrored.

Error of an element in units of |x_i| |x_j|, where x is a row, or a column on the feature side, K
terms are summed and u = 2^-24:

    16 bits     (K + 2) u
    float32     (K + 2) u + 12 u      tf32x3: a product is three of 10-bit significands, which
                                      lose at most 3 * 2^-22 of it
    centered    + (B / 16 + 16) u     the mean is rounded: |x| + mean |x| replaces |x| in the unit

`rdm::gram` is defined by its PyTorch body; Triton kernels replace it on CUDA. They ignore PyTorch's
global precision switches.
"""

from itertools import product
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.ops import cuda_launcher, define_op, describe
from rdm_kernels.tiles import (
    FULL,
    Blocks,
    mirrored,
    pad_rows,
    symmetric_product,
    symmetric_variants,
)
from rdm_kernels.variant import FP32, POINTERS, Variant

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def gram(
    X: Tensor,
    *,
    side: Literal["samples", "features"],
    center: bool = False,
    stacked: bool = False,
) -> Tensor:
    """Gram matrix of each batch of rows, or of all of them stacked.

    Args:
        X: [v, B, D], float16, bfloat16 or float32, not empty. Takes no gradient.
        side: X X^T ("samples") or X^T X ("features").
        center: subtract the mean row of each view first.
        stacked: treat the v views as one batch of v B rows; samples only. Each view keeps its own
            mean.

    Returns:
        Matrices [v, n, n], n = B or D, or [1, v B, v B] if stacked. The diagonal of one is not
        finite if X is not, or is too large (rows longer than 1e19).

    Raises:
        ValueError: X has another dtype or shape, or the options do not fit.
    """
    if X.ndim != 3 or X.dtype not in DTYPES or not X.numel():
        raise ValueError(
            "gram needs a non-empty X [v, B, D] of float16, bfloat16 or float32, "
            f"got {describe(X=X)}"
        )
    if side not in ("samples", "features"):
        raise ValueError(f'gram needs side="samples" or "features", got side={side!r}')
    if stacked and side == "features":
        raise ValueError('stacked=True stacks rows: use side="samples", or add X^T X of the views')
    with torch.autocast(X.device.type, enabled=False):
        return gram_op(X.detach(), side == "features", center, stacked)


def define_gram(X: Tensor, features: bool, center: bool, stacked: bool) -> Tensor:
    X = X.float()
    X = X - X.mean(dim=1, keepdim=True) if center else X
    X = X.flatten(0, 1)[None] if stacked else X
    return mirrored(X.mT @ X if features else X @ X.mT)


gram_op = define_op("gram", define_gram)


# ---- the Triton kernel of the means; products are in tiles.py --------------------------------


@triton.jit(do_not_specialize=["rows"])
def _mean_kernel(X_ptr, mean_ptr, rows, W, BLOCK_B: tl.constexpr, BLOCK_W: tl.constexpr):
    z = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros((BLOCK_B, BLOCK_W), tl.float32)
    for start in range(0, rows, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B).to(tl.int64)
        mask = (row[:, None] < rows) & (cols[None, :] < W)
        at = X_ptr + (z * rows + row[:, None]) * W + cols[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(mean_ptr + z * W + cols, tl.sum(total, axis=0) / rows, mask=cols < W)


# ---- block sizes and launcher ------------------------------------------------------------------

MEANS = {"BLOCK_B": 32, "BLOCK_W": 64, "num_warps": 4}


def is_narrow(dtype: torch.dtype, center: bool) -> bool:
    """Whether tiles are multiplied in 16 bits; all others are multiplied by tf32x3."""
    return dtype != torch.float32 and not center


LARGE = 1024  # above this n, larger tiles still fill a device


def blocks(dtype: torch.dtype, center: bool, n: int) -> Blocks:
    """Block sizes for an n x n Gram matrix."""
    if is_narrow(dtype, center):
        return Blocks(128, 64, 8, 3) if n > LARGE else Blocks(64, 32, 4, 4)
    return Blocks(64, 16, 8, 3) if center else FULL


@cuda_launcher(gram_op)
def gram_triton(
    X: Tensor,
    features: bool,
    center: bool,
    stacked: bool,
    block: Blocks | None = None,
    parts: int | None = None,
) -> Tensor:
    """`define_gram` by the kernels, in these blocks and at most so many parts of the sum."""
    v, B, D = X.shape
    X = pad_rows(X)
    W = X.shape[2]
    mean = None
    if center:
        mean = X.new_empty(v, W, dtype=torch.float32)
        _mean_kernel[(triton.cdiv(W, MEANS["BLOCK_W"]), v)](X, mean, B, W, **MEANS)
    X = X.view(1, v * B, W) if stacked else X
    n = D if features else X.shape[1]
    block = block or blocks(X.dtype, center, n)
    precision = "ieee" if is_narrow(X.dtype, center) else "tf32x3"
    return symmetric_product(
        X, X, n, block, parts, precision=precision, features=features, mean=mean, group=B
    )[0]


def variants() -> list[Variant]:
    """The means, and every product that `blocks` may choose."""
    found = []
    for name, X in POINTERS.items():
        types = {"X_ptr": X, "mean_ptr": FP32, "rows": "i32", "W": "i32:16"}
        found.append(Variant(_mean_kernel, types, MEANS))
        dtype = getattr(torch, name)
        for features, center, n in product((False, True), (False, True), (LARGE, LARGE + 1)):
            block = blocks(dtype, center, n)
            precision = "ieee" if is_narrow(dtype, center) else "tf32x3"
            found += symmetric_variants(X, precision, block, features=features, center=center)
    return found
