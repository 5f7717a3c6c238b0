"""Kernels that multiply tiles, and the launcher of symmetric products X Y^T and X^T Y.

`multiply_tile` is the inner loop of `gram`, `sym_matmul` and `product`. A symmetric product is one
launch: a program multiplies a tile on or below the diagonal, scales and shifts it, and stores each
element and its mirror image. So the result equals its transpose bit for bit. A long sum of few
tiles is split, and PyTorch adds the parts. A second launch computes the norm, if asked.

No kernel uses atomics, so the same input always gives the same bits.
"""

from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.variant import FP32, Variant

# Squares are summed after division by the largest value of a tile, clamped to this range, so the
# sum neither overflows nor vanishes unless the values themselves do.
SMALLEST, LARGEST = 1e-30, 1e30
_LOW, _HIGH = tl.constexpr(SMALLEST), tl.constexpr(LARGEST)

WIDTH = 16  # rows are zero-padded to a multiple, so that tiles are copied 16 bytes at a time
PROGRAMS = 132  # multiprocessors of an H100; fixed, so results do not depend on the device
MAX_PARTS = 16
STEPS = 16  # of a part at least: the launch that adds the parts takes about as long
NORM = {"BLOCK": 512, "num_warps": 4}


class Blocks(NamedTuple):
    """Tiles of BLOCK x BLOCK, summed BLOCK_K terms at a time."""

    BLOCK: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# For tf32x3. With eight warps a tile's sum would go through shared memory in each step, and larger
# tiles spill on sm_80.
FULL = Blocks(64, 32, 4, 3)


def mirrored(matrix: Tensor) -> Tensor:
    """The lower triangles of [v, n, n] and their mirror images, by PyTorch."""
    return matrix.tril() + matrix.tril(-1).mT


def lower_tiles(n: int, block: int) -> int:
    """Number of tiles on or below the diagonal of an n x n matrix."""
    side = triton.cdiv(n, block)
    return side * (side + 1) // 2


def num_parts(tiles: int, K: int, block: Blocks) -> int:
    """Number of chunks that gives the whole device work, each of at least STEPS steps."""
    return max(1, min(PROGRAMS // tiles, K // (STEPS * block.BLOCK_K), MAX_PARTS))


def chunks(K: int, parts: int, block: Blocks) -> tuple[int, int]:
    """Length of a chunk, a whole number of steps, and how many chunks K terms need (<= parts)."""
    chunk = triton.cdiv(triton.cdiv(K, parts), block.BLOCK_K) * block.BLOCK_K
    return chunk, triton.cdiv(K, chunk)


def pad_rows(X: Tensor) -> Tensor:
    """X, or a copy that is contiguous, 16-byte aligned and zero-padded to a multiple of WIDTH."""
    if missing := -X.shape[-1] % WIDTH:  # padding by nothing copies too
        return torch.nn.functional.pad(X, (0, missing)).contiguous()
    return aligned(X)


def aligned(X: Tensor) -> Tensor:
    """X, or a contiguous copy that begins at a multiple of 16 bytes."""
    X = X.contiguous()
    return X.clone() if X.data_ptr() % 16 else X


def interpreter_widens(X: Tensor) -> bool:
    """Whether to widen X before tl.dot: Triton's interpreter multiplies bfloat16 as integers."""
    return bool(triton.knobs.runtime.interpret) and X.dtype == torch.bfloat16


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _lower_tile(t):
    """Row and column of tile t of a lower triangle, numbered row by row."""
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the root is rounded
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2


@triton.jit
def _load(
    X_ptr, mean_ptr, z, first, k, stop, rows, W, group,
    COLUMNS: tl.constexpr, CENTER: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Terms k < stop of the lines from `first` on of matrix z [rows, W], minus the mean if CENTER.

    Zero outside. Offsets within a tile have 32 bits: 64-bit ones for all its elements would spill.
    """
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_K)[None, :]
    if COLUMNS:  # a line is a column; its terms run along the rows
        lines, terms = W, rows
        at, inside = (z * rows + k) * W + first, c * W + r
    else:
        lines, terms = rows, W
        at, inside = (z * rows + first) * W + k, r * W + c
    mask = (r < lines - first) & (c < tl.minimum(stop, terms) - k)
    x = tl.load(X_ptr + at + inside, mask=mask, other=0.0)
    if WIDE:
        x = x.to(tl.float32)
    if CENTER:
        if COLUMNS:
            mean_at = z * W + first + r + 0 * c
        else:
            mean_at = (z * rows + first + r) // group * W + k + c
        x = tl.where(mask, x - tl.load(mean_ptr + mean_at, mask=mask, other=0.0), 0.0)
    return x


@triton.jit
def multiply_tile(
    X_ptr, Y_ptr, mean_ptr, z, i, j, start, stop,
    x_rows, x_width, y_rows, y_width, group,
    X_COLUMNS: tl.constexpr, Y_COLUMNS: tl.constexpr, CENTER: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (i, j) of X Y^T in matrix z, summed from start to stop: [BLOCK, BLOCK].

    Multiplies lines of X by lines of Y, which are rows or columns of padded matrices. Each `group`
    rows share a mean.
    """
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(start, stop, BLOCK_K):
        x = _load(
            X_ptr, mean_ptr, z, i * BLOCK, k, stop, x_rows, x_width, group,
            X_COLUMNS, CENTER, WIDE, BLOCK, BLOCK_K,
        )  # fmt: skip
        y = _load(
            Y_ptr, mean_ptr, z, j * BLOCK, k, stop, y_rows, y_width, group,
            Y_COLUMNS, CENTER, WIDE, BLOCK, BLOCK_K,
        )  # fmt: skip
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["n", "rows", "group"])
def _symmetric_kernel(
    X_ptr, Y_ptr, mean_ptr, C_ptr, out_ptr, norms_ptr,
    n, rows, W, pitch, group, chunk, alpha, beta, gamma,
    FEATURES: tl.constexpr, CENTER: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Lower tile t of alpha S + beta C + gamma I in matrix z, and its mirror image.

    S is summed over chunk s. C and the result have rows of `pitch` elements, a multiple of 16.
    """
    t, s, z = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, j = _lower_tile(t)
    start = s * chunk
    stop = tl.minimum(start + chunk, rows if FEATURES else W)
    acc = alpha * multiply_tile(
        X_ptr, Y_ptr, mean_ptr, z, i, j, start, stop, rows, W, rows, W, group,
        FEATURES, FEATURES, CENTER, WIDE, PRECISION, BLOCK, BLOCK_K,
    )  # fmt: skip
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    rows_left, cols_left = n - i * BLOCK, n - j * BLOCK
    below = (i - j) * BLOCK  # a tile on the diagonal is mirrored within itself
    lower = (r < rows_left) & (c < cols_left) & (c <= r + below)
    upper = (r < cols_left) & (c < rows_left) & (r < c + below)
    i, j = (i * BLOCK).to(tl.int64), (j * BLOCK).to(tl.int64)
    at, mirrored_at, inside = i * pitch + j, j * pitch + i, r * pitch + c
    if C_ptr is not None:
        acc += beta * tl.load(C_ptr + z * n * pitch + at + inside, mask=lower, other=0.0)
    acc += tl.where(c == r + below, gamma, 0.0)
    if norms_ptr is not None:  # masked in place: a copy of the tile would take more registers
        acc = tl.where(lower, acc, 0.0)

    out_ptr += (z * tl.num_programs(1) + s) * n * pitch
    tl.store(out_ptr + at + inside, acc, mask=lower)
    tl.store(out_ptr + mirrored_at + inside, tl.trans(acc), mask=upper)

    if norms_ptr is not None:
        m = tl.max(tl.max(tl.abs(acc), axis=1), axis=0)
        m = tl.minimum(tl.maximum(m, _LOW), _HIGH)
        acc *= 1.0 / m
        squares = 2.0 * tl.sum(tl.sum(acc * acc, axis=1), axis=0)
        if below == 0:
            squares -= tl.sum(tl.sum(tl.where(r == c, acc * acc, 0.0), axis=1), axis=0)
        norms_ptr += (z * tl.num_programs(0) + t) * 2
        tl.store(norms_ptr, m)
        tl.store(norms_ptr + 1, squares)


@triton.jit(do_not_specialize=["tiles"])
def _norm_kernel(norms_ptr, norm_ptr, tiles, BLOCK: tl.constexpr):
    """Frobenius norm of matrix z, from a pair (m, sum of (value / m)^2) for each tile."""
    z = tl.program_id(0).to(tl.int64)
    norms_ptr += z * tiles * 2
    lanes = tl.arange(0, BLOCK)

    largest = tl.full((BLOCK,), _LOW, tl.float32)
    for start in range(0, tiles, BLOCK):
        at = start + lanes
        largest = tl.maximum(largest, tl.load(norms_ptr + 2 * at, mask=at < tiles, other=0.0))
    m = tl.max(largest, axis=0)

    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles, BLOCK):
        at = start + lanes
        ratio = tl.load(norms_ptr + 2 * at, mask=at < tiles, other=0.0) / m
        squares += ratio * ratio * tl.load(norms_ptr + 2 * at + 1, mask=at < tiles, other=0.0)
    tl.store(norm_ptr + z, m * tl.sqrt(tl.sum(squares, axis=0)))


# ---- launcher ------------------------------------------------------------------------------------


def symmetric_product(
    X: Tensor,
    Y: Tensor,
    n: int,
    block: Blocks,
    parts: int | None = None,
    *,
    precision: str = "tf32x3",
    features: bool = False,
    mean: Tensor | None = None,
    group: int = 1,
    C: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """alpha X Y^T (or X^T Y) + beta C + gamma I, [v, n, n]: the lower triangle, mirrored.

    Args:
        X, Y: [v, rows, W], from `pad_rows`.
        parts: largest number of chunks of the sum; None to fill the device. A sum with C, gamma or
            norm is never split.
        precision: of tl.dot.
        features: X^T Y, a product of columns, instead of X Y^T, a product of rows.
        mean: [views, W], subtracted from the rows of X and Y; each `group` rows share one.
        C: [v, n, n].
        norm: whether to compute the Frobenius norms [v]; [0] if not.
    """
    v, rows, W = X.shape
    K, tiles = rows if features else W, lower_tiles(n, block.BLOCK)
    whole = norm or C is not None or gamma != 0
    chunk, parts = chunks(K, 1 if whole else parts or num_parts(v * tiles, K, block), block)
    pitch = triton.cdiv(n, WIDTH) * WIDTH
    out = X.new_empty(v, parts, n, pitch, dtype=torch.float32)
    norms, squares = out.new_empty(v if norm else 0), out.new_empty(v, tiles, 2) if norm else None
    _symmetric_kernel[(tiles, parts, v)](
        X, Y, X if mean is None else mean, None if C is None else pad_rows(C), out, squares,
        n, rows, W, pitch, group, chunk, alpha, beta, gamma,
        FEATURES=features, CENTER=mean is not None, PRECISION=precision,
        WIDE=mean is not None or interpreter_widens(X), **block._asdict(),
    )  # fmt: skip
    if norm:
        _norm_kernel[(v,)](squares, norms, tiles, **NORM)
    matrix = out[:, 0] if parts == 1 else out.sum(dim=1)  # PyTorch adds the parts in a fixed order
    return matrix[:, :, :n].contiguous(), norms


def symmetric_variants(
    X: str, precision: str, block: Blocks, *, features: bool = False, center: bool = False,
    affine: bool = False,
) -> list[Variant]:  # fmt: skip
    """Products of elements of pointer type X: plain ones, and with C and with norm if affine."""
    types = {"X_ptr": X, "Y_ptr": X, "mean_ptr": FP32 if center else X, "out_ptr": FP32}
    types |= dict.fromkeys(("n", "rows", "group"), "i32")
    types |= dict.fromkeys(("W", "pitch", "chunk"), "i32:16")
    types |= dict.fromkeys(("alpha", "beta", "gamma"), "fp32")
    launch = {"FEATURES": features, "CENTER": center, "WIDE": center, "PRECISION": precision}
    found = []
    for C, norms in product((None, FP32), repeat=2) if affine else [(None, None)]:
        given = {"C_ptr": C, "norms_ptr": norms}
        found.append(
            Variant(
                _symmetric_kernel,
                types | {name: kind for name, kind in given.items() if kind},
                {name: None for name, kind in given.items() if not kind} | launch | block._asdict(),
                tensor_cores=True,
            )
        )
    return found


def variants() -> list[Variant]:
    """The norms; products are listed by the ops that launch them."""
    types = {"norms_ptr": FP32, "norm_ptr": FP32, "tiles": "i32"}
    return [Variant(_norm_kernel, types, NORM)]
