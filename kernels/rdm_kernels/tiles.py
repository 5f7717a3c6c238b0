"""Kernels that multiply tiles, and the launcher of symmetric products X Y^T and X^T Y.

`multiply_tile` is the inner loop of `gram`, `sym_matmul` and `product`. A symmetric product takes
three kernels:

    product   multiplies tiles on or below the diagonal, each split into chunks of the sum
    finish    adds the chunks in order, scales the sum and stores each element and its mirror image
    totals    computes the trace, the Frobenius norm and the non-finite flag

So the result equals its transpose bit for bit, and since no kernel uses atomics, the same input
always gives the same bits. A single kernel would spill registers: the mirrored store does not fit
beside the product where n is not a multiple of 16.
"""

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
LARGE = 1024  # from this n on, larger tiles still fill a device
PROGRAMS = 132  # multiprocessors of an H100; fixed, so results do not depend on the device
MAX_PARTS = 16
FINISH = {"SUB": 32, "num_warps": 4}
TOTALS = {"BLOCK": 512, "num_warps": 4}


class Blocks(NamedTuple):
    """Tiles of BLOCK x BLOCK, summed BLOCK_K terms at a time."""

    BLOCK: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Symmetric(NamedTuple):
    """v symmetric matrices and their totals, in float32 or float64."""

    matrix: Tensor  # [v, n, n], bitwise symmetric
    diagonal: Tensor  # [v, n]
    trace: Tensor  # [v]
    norm: Tensor  # [v]: Frobenius norm, which is at least the largest eigenvalue's magnitude
    nonfinite: Tensor  # [v] int32: 1 if the matrix holds NaN or infinity, else 0


def allocate(like: Tensor, v: int, n: int) -> Symmetric:
    """Uninitialized results for v matrices n x n, on the device of `like`."""
    matrix = like.new_empty(v, n, n, dtype=torch.float32)
    diagonal, trace, norm = matrix.new_empty(v, n), matrix.new_empty(v), matrix.new_empty(v)
    return Symmetric(matrix, diagonal, trace, norm, matrix.new_empty(v, dtype=torch.int32))


Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of `Symmetric`, as an op returns them


def symmetric_from_lower(matrix: Tensor) -> Fields:
    """The fields of `Symmetric`, computed by PyTorch from the lower triangle of [v, n, n]."""
    matrix = matrix.tril() + matrix.tril(-1).mT
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).clone()
    m = matrix.abs().amax(dim=(1, 2)).clamp(SMALLEST, LARGEST)
    norm = m * (matrix / m[:, None, None]).square().sum(dim=(1, 2)).sqrt()
    nonfinite = (~matrix.isfinite()).flatten(1).any(dim=1).to(torch.int32)
    return matrix, diagonal, diagonal.sum(dim=1), norm, nonfinite


def lower_tiles(n: int, block: int) -> int:
    """Number of tiles on or below the diagonal of an n x n matrix."""
    side = triton.cdiv(n, block)
    return side * (side + 1) // 2


def num_parts(tiles: int, K: int, block: Blocks) -> int:
    """Number of chunks that gives the whole device work, each at least 4 steps long."""
    return max(1, min(PROGRAMS // tiles, K // (4 * block.BLOCK_K), MAX_PARTS))


def chunks(K: int, parts: int, block: Blocks) -> tuple[int, int]:
    """Length of a chunk, a whole number of steps, and how many chunks K terms need (<= parts)."""
    chunk = triton.cdiv(triton.cdiv(K, parts), block.BLOCK_K) * block.BLOCK_K
    return chunk, triton.cdiv(K, chunk)


def pad_rows(X: Tensor) -> Tensor:
    """X, or a copy that is contiguous, 16-byte aligned and zero-padded to a multiple of WIDTH."""
    if missing := -X.shape[-1] % WIDTH:  # padding by nothing copies too
        return torch.nn.functional.pad(X, (0, missing)).contiguous()
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
    X_ptr, mean_ptr, z, line, k, stop, rows, W, group,
    COLUMNS: tl.constexpr, CENTER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Terms k < stop of these lines of matrix z [rows, W], minus the mean if CENTER; 0 outside."""
    if COLUMNS:  # a line is a column; its terms run along the rows
        lines, terms = W, rows
        at, mean_at = z * rows * W + k * W + line, z * W + line + 0 * k
    else:
        lines, terms = rows, W
        at, mean_at = z * rows * W + line * W + k, (z * rows + line) // group * W + k
    mask = (line < lines) & (k < tl.minimum(stop, terms))
    x = tl.load(X_ptr + at, mask=mask, other=0.0)
    if WIDE:
        x = x.to(tl.float32)
    if CENTER:
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
    a = i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)[:, None]
    b = j * BLOCK + tl.arange(0, BLOCK).to(tl.int64)[:, None]
    k = start + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(start, stop, BLOCK_K):
        x = _load(X_ptr, mean_ptr, z, a, k, stop, x_rows, x_width, group, X_COLUMNS, CENTER, WIDE)
        y = _load(Y_ptr, mean_ptr, z, b, k, stop, y_rows, y_width, group, Y_COLUMNS, CENTER, WIDE)
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
        k += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["rows", "group"])
def _product_kernel(
    X_ptr, Y_ptr, mean_ptr, work_ptr,
    rows, W, group, chunk,
    FEATURES: tl.constexpr, CENTER: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Lower tile t of matrix z, summed over chunk s."""
    t, s, z = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, j = _lower_tile(t)
    start = s.to(tl.int64) * chunk
    stop = tl.minimum(start + chunk, rows if FEATURES else W)
    acc = multiply_tile(
        X_ptr, Y_ptr, mean_ptr, z, i, j, start, stop, rows, W, rows, W, group,
        FEATURES, FEATURES, CENTER, WIDE, PRECISION, BLOCK, BLOCK_K,
    )  # fmt: skip
    at = ((z * tl.num_programs(1) + s) * tl.num_programs(0) + t) * BLOCK * BLOCK
    inside = tl.arange(0, BLOCK)
    tl.store(work_ptr + at + inside[:, None] * BLOCK + inside[None, :], acc)


@triton.jit(do_not_specialize=["parts", "tiles"])
def _finish_kernel(
    work_ptr, C_ptr, out_ptr, diagonal_ptr, norms_ptr,
    n, parts, tiles, alpha, beta, gamma,
    BLOCK: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Tile t, SUB x SUB, of alpha S + beta C + gamma I in matrix z; S is the sum of the parts."""
    t, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, j = _lower_tile(t)
    rows = i * SUB + tl.arange(0, SUB).to(tl.int64)
    cols = j * SUB + tl.arange(0, SUB).to(tl.int64)
    r, c = rows[:, None], cols[None, :]

    across: tl.constexpr = BLOCK // SUB
    I, J = i // across, j // across
    work_ptr += (z * parts * tiles + I * (I + 1) // 2 + J) * BLOCK * BLOCK
    work_ptr += (r - I * BLOCK) * BLOCK + (c - J * BLOCK)
    acc = tl.zeros((SUB, SUB), tl.float32)
    for _ in range(0, parts):
        acc += tl.load(work_ptr)
        work_ptr += tiles.to(tl.int64) * BLOCK * BLOCK

    out_ptr += z * n * n
    lower = (c <= r) & (r < n)
    acc *= alpha
    if C_ptr is not None:
        acc += beta * tl.load(C_ptr + z * n * n + r * n + c, mask=lower, other=0.0)
    acc += tl.where(r == c, gamma, 0.0)
    tl.store(out_ptr + r * n + c, acc, mask=lower)
    mirrored = (cols[:, None] < rows[None, :]) & (rows[None, :] < n)
    tl.store(out_ptr + cols[:, None] * n + rows[None, :], tl.trans(acc), mask=mirrored)
    if i == j:
        diagonal = tl.sum(tl.where(r == c, acc, 0.0), axis=1)
        tl.store(diagonal_ptr + z * n + rows, diagonal, mask=rows < n)

    values = tl.where(lower, acc, 0.0)
    m = tl.max(tl.max(tl.abs(values), axis=1), axis=0)
    m = tl.minimum(tl.maximum(m, _LOW), _HIGH)
    scaled = values * (1.0 / m)
    squares = tl.where(r == c, 1.0, 2.0) * scaled * scaled
    norms_ptr += (z * tl.num_programs(0) + t) * 2
    tl.store(norms_ptr, m)
    tl.store(norms_ptr + 1, tl.sum(tl.sum(squares, axis=1), axis=0))


@triton.jit(do_not_specialize=["n", "tiles"])
def _totals_kernel(
    diagonal_ptr, norms_ptr, trace_ptr, norm_ptr, nonfinite_ptr, n, tiles, BLOCK: tl.constexpr
):
    """Totals of matrix z in one program. A tile's norm is a pair (m, sum of (value / m)^2)."""
    z = tl.program_id(0).to(tl.int64)
    diagonal_ptr += z * n
    norms_ptr += z * tiles * 2
    lanes = tl.arange(0, BLOCK)

    trace = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + lanes
        trace += tl.load(diagonal_ptr + at, mask=at < n, other=0.0)

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
    total = tl.sum(squares, axis=0)

    tl.store(trace_ptr + z, tl.sum(trace, axis=0))
    tl.store(norm_ptr + z, m * tl.sqrt(total))
    tl.store(nonfinite_ptr + z, tl.where(total < float("inf"), 0, 1))


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
) -> Symmetric:
    """alpha X Y^T (or X^T Y) + beta C + gamma I, [v, n, n]: the lower triangle, mirrored.

    Args:
        X, Y: [v, rows, W], from `pad_rows`.
        parts: largest number of chunks of the sum; None to fill the device.
        precision: of tl.dot.
        features: X^T Y, a product of columns, instead of X Y^T, a product of rows.
        mean: [views, W], subtracted from the rows of X and Y; each `group` rows share one.
        C: [v, n, n], contiguous.
    """
    v, rows, W = X.shape
    K, tiles = rows if features else W, lower_tiles(n, block.BLOCK)
    chunk, parts = chunks(K, parts or num_parts(v * tiles, K, block), block)
    out = allocate(X, v, n)
    work = out.matrix.new_empty(v, parts, tiles, block.BLOCK, block.BLOCK)
    _product_kernel[(tiles, parts, v)](
        X, Y, X if mean is None else mean, work, rows, W, group, chunk,
        FEATURES=features, CENTER=mean is not None, PRECISION=precision,
        WIDE=mean is not None or interpreter_widens(X), **block._asdict(),
    )  # fmt: skip
    sub = min(FINISH["SUB"], block.BLOCK)
    norms = out.matrix.new_empty(v, lower_tiles(n, sub), 2)
    _finish_kernel[(norms.shape[1], v)](
        work, C, out.matrix, out.diagonal, norms, n, parts, tiles, alpha, beta, gamma,
        **FINISH | {"BLOCK": block.BLOCK, "SUB": sub},
    )  # fmt: skip
    _totals_kernel[(v,)](
        out.diagonal, norms, out.trace, out.norm, out.nonfinite, n, norms.shape[1], **TOTALS
    )
    return out


def product_variant(X: str, precision: str, block: Blocks, features: bool, center: bool) -> Variant:
    """A product of elements of pointer type X."""
    types = {"X_ptr": X, "Y_ptr": X, "mean_ptr": FP32 if center else X, "work_ptr": FP32}
    types |= {"rows": "i32", "W": "i32:16", "group": "i32", "chunk": "i32:16"}
    launch = {"FEATURES": features, "CENTER": center, "WIDE": center, "PRECISION": precision}
    return Variant(_product_kernel, types, launch | block._asdict(), tensor_cores=True)


def finish_variant(block: Blocks, affine: bool) -> Variant:
    """The finish of a product in these blocks; with beta C if affine."""
    types = dict.fromkeys(("work_ptr", "out_ptr", "diagonal_ptr", "norms_ptr"), FP32)
    types |= dict.fromkeys(("n", "parts", "tiles"), "i32")
    types |= dict.fromkeys(("alpha", "beta", "gamma"), "fp32")
    launch = {"BLOCK": block.BLOCK, **FINISH}
    if affine:
        return Variant(_finish_kernel, types | {"C_ptr": FP32}, launch)
    return Variant(_finish_kernel, types, {"C_ptr": None, **launch})


def variants() -> list[Variant]:
    """The totals; products and finishes are listed by the ops that launch them."""
    types = dict.fromkeys(("diagonal_ptr", "norms_ptr", "trace_ptr", "norm_ptr"), FP32)
    types |= {"nonfinite_ptr": "*i32", "n": "i32", "tiles": "i32"}
    return [Variant(_totals_kernel, types, TOTALS)]
