"""Gram matrices of batches of rows, in float32, equal to their transposes bit for bit.

    samples    G = X X^T [B, B]        features    G = X^T X [D, D]
    stacked    G = [X1; X2] [X1; X2]^T [2B, 2B]: X1 X1^T, X2 X2^T and X2 X1^T at once

Products of 16-bit values are exact in float32, so a Gram matrix of a 16-bit batch has the accuracy
of float32 sums, provided it is not stored in 16 bits. With `centre`, the mean row of each view is
subtracted while rows are read. Only tiles at or under the diagonal are computed. With each matrix
come its diagonal, trace, Frobenius norm and a flag, all on the device, that would else cost
another pass each.

Error of an element, in units of |x_i| |x_j| (x a row, or a column on the feature side; as it was
before centring), K terms summed, u = 2^-24:

    16 bits, or precision="ieee"    (K + 2) u           and  + 8 u  when centred
    float32, precision="tf32x3"     (K + 2) u + 12 u    each product a sum of three of 10-bit
                                                        significands, all but 3 * 2^-22 of it

The op `rdm::gram` is *defined* by its PyTorch body below, which also runs on CPU. Triton registers
itself as that op's CUDA kernel, so callers never choose. Nothing here reads PyTorch's global
switches of float32 precision on CUDA.
"""

from itertools import product
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.tiles import LARGEST, SMALLEST, lower_tile, lower_tiles, store_symmetric, totals
from rdm_kernels.variant import POINTERS, Variant

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRECISIONS = ("tf32x3", "ieee")


class Gram(NamedTuple):
    """Gram matrices of v batches and what their computation gives away; all float32 but the flag.

    v is 1 if they were stacked.
    """

    G: Tensor  # [v, n, n], bitwise symmetric
    diagonal: Tensor  # [v, n]: squared length of each row, or of each column on the feature side
    trace: Tensor  # [v]: sum of squares of X, or of the centred X
    norm: Tensor  # [v]: Frobenius norm of G, at least its largest eigenvalue
    nonfinite: Tensor  # [v] int32: 1 if G holds NaN or infinity, as it does if X does, else 0


def gram(
    X: Tensor,
    *,
    side: Literal["samples", "features"],
    centre: bool = False,
    stacked: bool = False,
    precision: Literal["tf32x3", "ieee"] = "tf32x3",
) -> Gram:
    """Gram matrix of each batch of rows, or one of all of them stacked.

    Args:
        X: [v, B, D], float16, bfloat16 or float32, none of the sizes 0. Takes no gradient.
        side: X X^T ("samples") or X^T X ("features").
        centre: subtract the mean row of each view first.
        stacked: treat the v views as one batch of v B rows; samples only. Means stay per view.
        precision: how products of float32 values (or of centred ones) are formed on CUDA: as
            three products on tensor cores, or as they are.

    Returns:
        Gram matrices [v, n, n], n = B or D, or [1, v B, v B] if stacked, with diagonal, trace,
        norm and flag. What leaves float32's range (rows longer than 1e19) is flagged too.

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
        return Gram(*gram_op(X.detach(), side == "features", centre, stacked, precision))


# ---- the op, defined by its body -------------------------------------------------------------


@torch.library.custom_op("rdm::gram", mutates_args=())
def gram_op(
    X: Tensor, features: bool, centre: bool, stacked: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Gram`."""
    X = X.float()
    X = X - X.mean(dim=1, keepdim=True) if centre else X
    X = X.flatten(0, 1)[None] if stacked else X
    G = X.mT @ X if features else X @ X.mT
    G = G.tril() + G.tril(-1).mT
    diagonal = G.diagonal(dim1=-2, dim2=-1).clone()
    m = G.abs().amax(dim=(1, 2)).clamp(SMALLEST, LARGEST)
    norm = m * (G / m[:, None, None]).square().sum(dim=(1, 2)).sqrt()
    nonfinite = (~G.isfinite()).flatten(1).any(dim=1).to(torch.int32)
    return G, diagonal, diagonal.sum(dim=1), norm, nonfinite


@gram_op.register_fake
def _(
    X: Tensor, features: bool, centre: bool, stacked: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    v, B, D = X.shape
    return _empty(X, 1 if stacked else v, D if features else v * B if stacked else B)


def _empty(X: Tensor, v: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    G = X.new_empty(v, n, n, dtype=torch.float32)
    diagonal, trace, norm = G.new_empty(v, n), G.new_empty(v), G.new_empty(v)
    return G, diagonal, trace, norm, G.new_empty(v, dtype=torch.int32)


# ---- the Triton kernels ------------------------------------------------------------------------


@triton.jit
def _mean_kernel(X_ptr, mean_ptr, B, D, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    z = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in range(0, B, BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B).to(tl.int64)
        mask = (rows[:, None] < B) & (cols[None, :] < D)
        at = X_ptr + (z * B + rows[:, None]) * D + cols[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(mean_ptr + z * D + cols, tl.sum(total, axis=0) / B, mask=cols < D)


@triton.jit
def _tile(X_ptr, mean_ptr, line, k, lines, K, CENTRE: tl.constexpr, WIDE: tl.constexpr):
    """Values at these addresses, as they are or centred; 0 outside the matrix. [BLOCK, BLOCK_K]"""
    mask = (line[:, None] < lines) & (k[None, :] < K)
    x = tl.load(X_ptr, mask=mask, other=0.0)
    if WIDE:
        x = x.to(tl.float32)
    if CENTRE:
        x = tl.where(mask, x - tl.load(mean_ptr, mask=mask, other=0.0), 0.0)
    return x


@triton.jit
def _gram_kernel(
    X_ptr, mean_ptr, G_ptr, diagonal_ptr, norms_ptr, work_ptr,
    rows, D, group, chunk,
    FEATURES: tl.constexpr, CENTRE: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Lower tile t of view z, of the terms in chunk s of the sum; means are of `group` rows."""
    t, s, z = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = tl.num_programs(0)
    i, j = lower_tile(t)
    n = D if FEATURES else rows
    K = rows if FEATURES else D
    a_line = i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    b_line = j * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    k = s * chunk + tl.arange(0, BLOCK_K).to(tl.int64)
    stop = tl.minimum((s + 1) * chunk, K)

    X_ptr += z * rows * D
    if FEATURES:
        a_ptr = X_ptr + k[None, :] * D + a_line[:, None]
        b_ptr = X_ptr + k[None, :] * D + b_line[:, None]
        a_mean = mean_ptr + z * D + a_line[:, None] + 0 * k[None, :]
        b_mean = mean_ptr + z * D + b_line[:, None] + 0 * k[None, :]
    else:
        a_ptr = X_ptr + a_line[:, None] * D + k[None, :]
        b_ptr = X_ptr + b_line[:, None] * D + k[None, :]
        a_mean = mean_ptr + ((z * rows + a_line) // group)[:, None] * D + k[None, :]
        b_mean = mean_ptr + ((z * rows + b_line) // group)[:, None] * D + k[None, :]

    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(s * chunk, stop, BLOCK_K):
        a = _tile(a_ptr, a_mean, a_line, k, n, stop, CENTRE, WIDE)
        b = _tile(b_ptr, b_mean, b_line, k, n, stop, CENTRE, WIDE)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        k += BLOCK_K
        if FEATURES:
            a_ptr += BLOCK_K * D.to(tl.int64)
            b_ptr += BLOCK_K * D.to(tl.int64)
        else:
            a_ptr += BLOCK_K
            b_ptr += BLOCK_K
            a_mean += BLOCK_K
            b_mean += BLOCK_K

    if SPLIT:
        at = ((z * tl.num_programs(1) + s) * tiles + t) * BLOCK * BLOCK
        inside = tl.arange(0, BLOCK)
        tl.store(work_ptr + at + inside[:, None] * BLOCK + inside[None, :], acc)
    else:
        norms_ptr += (z * tiles + t) * 2
        store_symmetric(acc, i, j, G_ptr + z * n * n, diagonal_ptr + z * n, norms_ptr, n, BLOCK)


@triton.jit
def _gram_sum_kernel(
    work_ptr, G_ptr, diagonal_ptr, norms_ptr, n, splits, BLOCK: tl.constexpr
):  # fmt: skip
    """Lower tile t of view z: the sum of its splits, first to last."""
    t, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    i, j = lower_tile(t)
    inside = tl.arange(0, BLOCK)
    work_ptr += inside[:, None] * BLOCK + inside[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for s in range(0, splits):
        acc += tl.load(work_ptr + ((z * splits + s) * tiles + t) * BLOCK * BLOCK)
    norms_ptr += (z * tiles + t) * 2
    store_symmetric(acc, i, j, G_ptr + z * n * n, diagonal_ptr + z * n, norms_ptr, n, BLOCK)


# ---- block sizes and launchers -----------------------------------------------------------------


class Blocks(NamedTuple):
    """Tiles of BLOCK x BLOCK, summed BLOCK_K terms at a time."""

    BLOCK: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


LARGE = 1024  # from this n on, larger tiles still fill a device
PROGRAMS = 132  # streaming multiprocessors of an H100; sizes alone decide, so results do not vary
MAX_SPLITS = 16
MEANS = {"BLOCK_B": 32, "BLOCK_D": 64, "num_warps": 4}


def blocks(dtype: torch.dtype, centre: bool, precision: str, n: int) -> Blocks:
    """Block sizes for an n x n Gram matrix."""
    if dtype != torch.float32 and not centre:  # 16-bit products
        return Blocks(128, 64, 8, 3) if n >= LARGE else Blocks(64, 64, 4, 4)
    if precision == "tf32x3" and not centre and n >= LARGE:
        return Blocks(128, 32, 8, 3)
    return Blocks(64, 32, 4, 3)


def splits(v: int, n: int, K: int, block: Blocks) -> int:
    """In how many parts to sum so that all of a device has work, each at least 4 steps long."""
    room = PROGRAMS // (v * lower_tiles(n, block.BLOCK))
    return max(1, min(room, K // (4 * block.BLOCK_K), MAX_SPLITS))


@gram_op.register_kernel("cuda")
def gram_triton(
    X: Tensor, features: bool, centre: bool, stacked: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    v, B, D = X.shape
    v, rows = (1, v * B) if stacked else (v, B)
    n, K = (D, rows) if features else (rows, D)
    block = blocks(X.dtype, centre, precision, n)
    return launch(X, features, centre, stacked, precision, block, splits(v, n, K, block))


def launch(
    X: Tensor,
    features: bool,
    centre: bool,
    stacked: bool,
    precision: str,
    block: Blocks,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op by its kernels, with these block sizes, summed in at most so many parts."""
    X = X.contiguous()
    v, B, D = X.shape
    mean = X  # not read
    if centre:
        mean = X.new_empty(v, D, dtype=torch.float32)
        _mean_kernel[(triton.cdiv(D, MEANS["BLOCK_D"]), v)](X, mean, B, D, **MEANS)
    v, rows = (1, v * B) if stacked else (v, B)
    n, K = (D, rows) if features else (rows, D)
    out = G, diagonal, trace, norm, nonfinite = _empty(X, v, n)
    tiles = lower_tiles(n, block.BLOCK)
    norms = G.new_empty(v, tiles, 2)

    chunk = triton.cdiv(triton.cdiv(K, parts), block.BLOCK_K) * block.BLOCK_K
    parts = triton.cdiv(K, chunk)
    # Triton's interpreter multiplies bfloat16 as if its bits were integers.
    wide = centre or (triton.knobs.runtime.interpret and X.dtype == torch.bfloat16)
    work = G.new_empty(v * parts * tiles * block.BLOCK**2) if parts > 1 else G
    _gram_kernel[(tiles, parts, v)](
        X, mean, G, diagonal, norms, work, rows, D, B, chunk,
        FEATURES=features, CENTRE=centre, WIDE=wide, SPLIT=parts > 1,
        PRECISION=precision, **block._asdict(),
    )  # fmt: skip
    if parts > 1:
        _gram_sum_kernel[(tiles, v)](
            work, G, diagonal, norms, n, parts, BLOCK=block.BLOCK, num_warps=block.num_warps
        )
    totals(diagonal, norms, trace, norm, nonfinite)
    return out


def variants() -> list[Variant]:
    fp32 = POINTERS["float32"]
    found = []
    for dtype, pointer in POINTERS.items():
        types = {"X_ptr": pointer, "mean_ptr": fp32, "B": "i32", "D": "i32"}
        constants = {name: value for name, value in MEANS.items() if name != "num_warps"}
        found.append(Variant(_mean_kernel, types, constants, MEANS["num_warps"]))
        for features, centre, precision, n, split in product(
            (False, True), (False, True), PRECISIONS, (LARGE - 1, LARGE), (False, True)
        ):
            block = blocks(getattr(torch, dtype), centre, precision, n)
            names = ("mean_ptr", "G_ptr", "diagonal_ptr", "norms_ptr", "work_ptr")
            types = {"X_ptr": pointer} | dict.fromkeys(names, fp32)
            types |= {} if centre else {"mean_ptr": pointer}
            types |= dict.fromkeys(("rows", "D", "group", "chunk"), "i32")
            constants = {
                "FEATURES": features, "CENTRE": centre, "WIDE": centre, "SPLIT": split,
                "PRECISION": precision, "BLOCK": block.BLOCK, "BLOCK_K": block.BLOCK_K,
            }  # fmt: skip
            dots = precision != "ieee" or (dtype != "float32" and not centre)
            options = (block.num_warps, block.num_stages)
            found.append(Variant(_gram_kernel, types, constants, *options, tensor_cores=dots))
            names = ("work_ptr", "G_ptr", "diagonal_ptr", "norms_ptr")
            types = dict.fromkeys(names, fp32) | dict.fromkeys(("n", "splits"), "i32")
            found.append(Variant(_gram_sum_kernel, types, {"BLOCK": block.BLOCK}, options[0]))
    return found
