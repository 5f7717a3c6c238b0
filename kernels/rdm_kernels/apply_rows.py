"""Rows of a gradient from their coefficients: dp = scale N X, in p's dtype.

N [v, b, k] is float32 or float64, and X [v, k, D] is usually a 16-bit batch. A gradient through
small singular values needs N to more than 16 bits, so the kernel splits N in registers into two
terms that tensor cores multiply exactly, and loads X once for both. Sums are in float32. Error of
an element in units of |scale| sum_k |N_ik| |X_kj|, u = 2^-24, before rounding to p's dtype:

    X bfloat16    2^-16 + (2 k + 3) u   N as two bfloat16 terms, at the full 16-bit rate
    X float16     2^-20 + (2 k + 3) u   N as two tf32 terms, because float16 lacks the range for N;
                                        tf32 holds X exactly
    X float32     12 u + (k + 3) u      tf32x3

A view with a loss that is not finite gets zeros, whatever N and X hold.

`rdm::apply_rows` is defined by its PyTorch body, in float32, or in float64 for float64 rows; Triton
kernels replace it on CUDA, except for float64 rows.
"""

from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.ops import cuda_launcher, define_op
from rdm_kernels.tiles import PROGRAMS, interpreter_widens, pad_rows
from rdm_kernels.variant import FP32, POINTERS, Variant

# ---- the op, defined by its body -------------------------------------------------------------


def define_apply_rows(
    N: Tensor, X: Tensor | None, scale: Tensor, loss: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """scale N X for each view, [v, b, D] in this dtype; zero where the view's loss is not finite.

    Args:
        N: [v, b, k], float32 or float64.
        X: [v, k, D], any floating dtype; None for the identity.
        scale: [v], on the device.
        loss: likewise; None if there is none.
    """
    wide = torch.promote_types(dtype, torch.float32)
    rows = (scale[:, None, None] * N).to(wide)
    rows = rows if X is None else rows @ X.to(wide)
    if loss is not None:
        rows = rows.masked_fill_(~loss.isfinite()[:, None, None], 0)
    return rows.to(dtype).contiguous()


apply_rows = define_op("apply_rows", define_apply_rows)


# ---- the Triton kernels ------------------------------------------------------------------------


@triton.jit
def _dot(n, x, acc, WIDE: tl.constexpr):
    """acc + n x for float32 n [BLOCK_M, BLOCK_K], split to suit the dtype of x."""
    if x.dtype == tl.bfloat16:
        high = n.to(tl.bfloat16)
        low = (n - high.to(tl.float32)).to(tl.bfloat16)
        if WIDE:
            high, low, x = high.to(tl.float32), low.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(low, x, acc)
        acc = tl.dot(high, x, acc)
    elif x.dtype == tl.float16:
        high = (n.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # 10 bits kept
        x = x.to(tl.float32)
        acc = tl.dot(n - high, x, acc, input_precision="tf32")
        acc = tl.dot(high, x, acc, input_precision="tf32")
    else:
        acc = tl.dot(n, x, acc, input_precision="tf32x3")
    return acc


@triton.jit(do_not_specialize=["b", "k"])
def _apply_kernel(
    N_ptr, X_ptr, scale_ptr, loss_ptr, dp_ptr,
    b, k, K, W, D,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of view z. Rows of N are padded to K values, rows of X to W; those of dp have D."""
    z = tl.program_id(2).to(tl.int64)
    row, col = tl.program_id(1) * BLOCK_M, tl.program_id(0) * BLOCK_D
    rows, cols = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_D)[None, :]
    terms = tl.arange(0, BLOCK_K)
    finite = True
    if loss_ptr is not None:
        finite = tl.abs(tl.load(loss_ptr + z)) < float("inf")

    # Offsets within a tile have 32 bits: 64-bit ones for all its elements would spill.
    N_ptr += (z * b + row) * K
    X_ptr += z * k * W + col
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, tl.where(finite, K, 0), BLOCK_K):
        in_N = (rows < b - row) & (terms[None, :] < K - start)
        in_X = (terms[:, None] < k - start) & (cols < W - col)
        n = tl.load(N_ptr + rows * K + terms[None, :], mask=in_N, other=0.0)
        x = tl.load(X_ptr + terms[:, None] * W + cols, mask=in_X, other=0.0)
        acc = _dot(n, x, acc, WIDE)
        N_ptr += BLOCK_K
        X_ptr += BLOCK_K * W.to(tl.int64)

    dp = tl.where(finite, tl.load(scale_ptr + z) * acc, 0.0)
    dp_ptr += (z * b + row) * D + col
    inside = (rows < b - row) & (cols < D - col)
    tl.store(dp_ptr + rows * D + cols, dp.to(dp_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(N_ptr, scale_ptr, loss_ptr, dp_ptr, size, BLOCK: tl.constexpr):
    """scale N of view z, `size` values in all."""
    z = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(N_ptr + z * size + at, mask=at < size, other=0.0).to(tl.float32)
    dp = tl.load(scale_ptr + z) * n
    if loss_ptr is not None:
        dp = tl.where(tl.abs(tl.load(loss_ptr + z)) < float("inf"), dp, 0.0)
    tl.store(dp_ptr + z * size + at, dp.to(dp_ptr.dtype.element_ty), mask=at < size)


# ---- block sizes and launcher ------------------------------------------------------------------


class Tiles(NamedTuple):
    """Tiles of BLOCK_M rows and BLOCK_D columns of dp, summed BLOCK_K terms at a time."""

    BLOCK_M: int
    BLOCK_D: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


SCALE = {"BLOCK": 1024, "num_warps": 4}


def blocks(dtype: torch.dtype, v: int, b: int, D: int) -> Tiles:
    """Tiles for X of this dtype: large ones where they still fill half a device.

    Large ones spill if D is not a multiple of 16 (Triton 3.6, sm_100).
    """
    large = v * triton.cdiv(b, 128) * triton.cdiv(D, 128) >= PROGRAMS // 2 and D % 16 == 0
    if dtype == torch.bfloat16:
        return Tiles(128, 128, 32, 8, 4) if large else Tiles(64, 64, 64, 4, 3)
    return Tiles(128, 128, 16, 8, 3) if large else Tiles(64, 64, 32, 4, 3)


@cuda_launcher(apply_rows)
def apply_rows_triton(
    N: Tensor,
    X: Tensor | None,
    scale: Tensor,
    loss: Tensor | None,
    dtype: torch.dtype,
    block: Tiles | None = None,
) -> Tensor:
    """`define_apply_rows` by the kernels, in these tiles."""
    if dtype == torch.float64:
        return define_apply_rows(N, X, scale, loss, dtype)
    v, b, k = N.shape
    scale = scale.float().contiguous()
    loss = None if loss is None else loss.float().contiguous()
    if X is None:
        N = N.contiguous()
        dp = N.new_empty(N.shape, dtype=dtype)
        _scale_kernel[(triton.cdiv(b * k, SCALE["BLOCK"]), v)](N, scale, loss, dp, b * k, **SCALE)
        return dp
    D = X.shape[2]
    N, X = pad_rows(N.float()), pad_rows(X.float() if X.dtype == torch.float64 else X)
    block = block or blocks(X.dtype, v, b, D)
    dp = N.new_empty(v, b, D, dtype=dtype)
    grid = (triton.cdiv(D, block.BLOCK_D), triton.cdiv(b, block.BLOCK_M), v)
    _apply_kernel[grid](
        N, X, scale, loss, dp, b, k, N.shape[2], X.shape[2], D,
        WIDE=interpreter_widens(X), **block._asdict(),
    )  # fmt: skip
    return dp


def variants() -> list[Variant]:
    """Every tile that `blocks` may choose for every pair of dtypes; rows of a loss and others."""
    found = []
    for dp, has_loss in product(POINTERS.values(), (True, False)):
        types = {"scale_ptr": FP32, "dp_ptr": dp} | ({"loss_ptr": FP32} if has_loss else {})
        none = {} if has_loss else {"loss_ptr": None}
        for N in (FP32, "*fp64"):
            scaled = types | {"N_ptr": N, "size": "i32"}
            found.append(Variant(_scale_kernel, scaled, none | SCALE))
        types |= {"N_ptr": FP32, "b": "i32", "k": "i32", "K": "i32:16", "W": "i32:16"}
        for (name, X), D in product(POINTERS.items(), (1, 128 * PROGRAMS)):
            launch = none | {"WIDE": False} | blocks(getattr(torch, name), 1, 1, D)._asdict()
            sizes = {"X_ptr": X, "D": "i32" if D % 16 else "i32:16"}
            found.append(Variant(_apply_kernel, types | sizes, launch, tensor_cores=True))
    return found
