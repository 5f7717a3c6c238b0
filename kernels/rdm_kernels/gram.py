"""Gram matrices of batches of rows, in float32, equal to their transposes bit for bit.

    samples    G = X X^T [B, B]        features    G = X^T X [D, D]
    stacked    G = [X1; X2] [X1; X2]^T [2B, 2B]: X1 X1^T, X2 X2^T and X2 X1^T at once

Products of 16-bit values are exact in float32, so a Gram matrix of a 16-bit batch has the accuracy
of float32 sums, provided it is not stored in 16 bits. With `center`, the mean row of each view is
subtracted while rows are read. Only tiles at or under the diagonal are computed. With each matrix
come its diagonal, trace, Frobenius norm and a flag, all on the device, that would else cost
another pass each.

Error of an element, in units of |x_i| |x_j| (x a row, or a column on the feature side), K terms
summed, u = 2^-24:

    16 bits, or precision="ieee"    (K + 2) u
    float32, precision="tf32x3"     (K + 2) u + 12 u    each product a sum of three of 10-bit
                                                        significands, all but 3 * 2^-22 of it
    centered                         + (B / 16 + 16) u   the mean is rounded: x stands for
                                                        |x| + mean |x| in the unit

The op `rdm::gram` is *defined* by its PyTorch body below, which also runs on CPU. Triton registers
itself as that op's CUDA kernel, so callers never choose. Nothing here reads PyTorch's global
switches of float32 precision on CUDA.
"""

from itertools import product
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.tiles import (
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
from rdm_kernels.variant import POINTERS, Variant

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRECISIONS = ("tf32x3", "ieee")


def gram(
    X: Tensor,
    *,
    side: Literal["samples", "features"],
    center: bool = False,
    stacked: bool = False,
    precision: Literal["tf32x3", "ieee"] = "tf32x3",
) -> Symmetric:
    """Gram matrix of each batch of rows, or one of all of them stacked.

    Args:
        X: [v, B, D], float16, bfloat16 or float32, none of the sizes 0. Takes no gradient.
        side: X X^T ("samples") or X^T X ("features").
        center: subtract the mean row of each view first.
        stacked: treat the v views as one batch of v B rows; samples only. Means stay per view.
        precision: how products of float32 values (or of centered ones) are formed on CUDA: as
            three products on tensor cores, or as they are.

    Returns:
        Gram matrices [v, n, n], n = B or D, or [1, v B, v B] if stacked; their diagonals, which
        are squared lengths of rows or columns; trace, Frobenius norm, and a flag which is set if
        X is not finite, or G is not because X is too large (rows longer than 1e19).

    Raises:
        ValueError: X has another dtype or shape, or an option is unknown or does not fit.
    """
    if X.ndim != 3 or X.dtype not in DTYPES or not X.numel():
        raise ValueError(
            "gram needs a non-empty [v, B, D] tensor of float16, bfloat16 or float32, "
            f"got {X.dtype} {tuple(X.shape)}"
        )
    if side not in ("samples", "features") or precision not in PRECISIONS:
        raise ValueError(
            'gram knows side "samples" and "features" and precision "tf32x3" and "ieee", '
            f"got side={side!r}, precision={precision!r}"
        )
    if stacked and side == "features":
        raise ValueError('stacked=True stacks rows: use side="samples", or add X^T X of the views')
    with torch.autocast(X.device.type, enabled=False):
        return Symmetric(*gram_op(X.detach(), side == "features", center, stacked, precision))


# ---- the op, defined by its body -------------------------------------------------------------


@torch.library.custom_op("rdm::gram", mutates_args=())
def gram_op(
    X: Tensor, features: bool, center: bool, stacked: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Symmetric`."""
    X = X.float()
    X = X - X.mean(dim=1, keepdim=True) if center else X
    X = X.flatten(0, 1)[None] if stacked else X
    return defined(X.mT @ X if features else X @ X.mT)


@gram_op.register_fake
def _(
    X: Tensor, features: bool, center: bool, stacked: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    v, B, D = X.shape
    v, rows = (1, v * B) if stacked else (v, B)
    return empty(X, v, D if features else rows)


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


# ---- block sizes and launchers -----------------------------------------------------------------

MEANS = {"BLOCK_B": 32, "BLOCK_W": 64, "num_warps": 4}


def dot_precision(dtype: torch.dtype, center: bool, precision: str) -> str:
    """How tiles are multiplied: of 16-bit values as they are, products being exact anyway."""
    return precision if dtype == torch.float32 or center else "ieee"


def blocks(dtype: torch.dtype, center: bool, precision: str, n: int) -> Blocks:
    """Block sizes for an n x n Gram matrix."""
    if dtype != torch.float32 and not center:  # 16-bit products
        return Blocks(128, 64, 8, 3) if n >= LARGE else Blocks(64, 32, 4, 4)
    if precision == "ieee":
        return Blocks(64, 16, 8, 1) if center else Blocks(64, 16, 4, 2)
    if center:
        return Blocks(64, 16, 8, 3)
    return Blocks(128, 16, 8, 3) if n >= LARGE else Blocks(64, 32, 8, 3)


@gram_op.register_kernel("cuda")
def gram_triton(
    X: Tensor, features: bool, center: bool, stacked: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    v, B, D = X.shape
    v, rows = (1, v * B) if stacked else (v, B)
    n, K = (D, rows) if features else (rows, D)
    block = blocks(X.dtype, center, precision, n)
    return launch(X, features, center, stacked, precision, block, parts(v, n, K, block))


def launch(
    X: Tensor,
    features: bool,
    center: bool,
    stacked: bool,
    precision: str,
    block: Blocks,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op by its kernels, with these block sizes, summed in at most so many parts."""
    v, B, D = X.shape
    X = padded(X)
    W = X.shape[2]
    mean = None
    if center:
        mean = X.new_empty(v, W, dtype=torch.float32)
        _mean_kernel[(triton.cdiv(W, MEANS["BLOCK_W"]), v)](X, mean, B, W, **MEANS)
    X = X.view(1, v * B, W) if stacked else X
    return symmetric_product(
        X,
        X,
        D if features else X.shape[1],
        precision=dot_precision(X.dtype, center, precision),
        block=block,
        parts=parts,
        features=features,
        mean=mean,
        group=B,
    )


def variants() -> list[Variant]:
    """Of the means and of every product that `blocks` may choose."""
    found = []
    for name, pointer in POINTERS.items():
        types = {"X_ptr": pointer, "mean_ptr": "*fp32", "rows": "i32", "W": "i32:16"}
        constants = {key: value for key, value in MEANS.items() if key != "num_warps"}
        found.append(Variant(_mean_kernel, types, constants, MEANS["num_warps"]))
        dtype = getattr(torch, name)
        for features, center, precision, n in product(
            (False, True), (False, True), PRECISIONS, (LARGE - 1, LARGE)
        ):
            block = blocks(dtype, center, precision, n)
            dot = dot_precision(dtype, center, precision)
            found.append(product_variant(pointer, dot, block, features, center))
            found.append(finish_variant(block, affine=False))
    return found
