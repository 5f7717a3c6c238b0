"""Tiles of matrix products, and symmetric products X Y^T or X^T Y made of those: two ops' kernels.

`multiplied` is the one place where tiles are multiplied, also those of product.py. For a symmetric
product, three kernels, one after the other, none with atomics, so the same input gives the same
bits:

    product   tiles at or under the diagonal, each cut into chunks of the sum, to a workspace
    finish    adds the chunks first to last, scales, and stores each element twice, mirrored: the
              result equals its transpose bit for bit, whatever the order of sums in a tile was
    totals    trace, Frobenius norm and a flag of what is not finite

Storing tiles first and finishing them in smaller ones keeps the product's registers for products:
in one kernel, the mirrored store of an n that is no multiple of 16 spills them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.variant import Variant

# Sums of squares are of values divided by the largest of a tile, itself held in this range, so
# that they neither overflow nor vanish wherever the values themselves do not.
SMALLEST, LARGEST = 1e-30, 1e30
_LOW, _HIGH = tl.constexpr(SMALLEST), tl.constexpr(LARGEST)

FP32 = "*fp32"
WIDTH = 16  # rows of X reach the kernels padded with zeros to a multiple of so many columns, W:
# only then can tiles be copied to shared memory 16 bytes at a time, while others are multiplied
LARGE = 1024  # from this n on, larger tiles still fill a device
PROGRAMS = 132  # streaming multiprocessors of an H100; sizes alone decide, so results do not vary
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
    """v symmetric matrices and what their computation gives away; float32 (or 64) but the flag."""

    matrix: Tensor  # [v, n, n], bitwise symmetric
    diagonal: Tensor  # [v, n]
    trace: Tensor  # [v]
    norm: Tensor  # [v]: Frobenius norm, which is at least the largest eigenvalue's magnitude
    nonfinite: Tensor  # [v] int32: 1 if the matrix holds NaN or infinity, else 0


def empty(like: Tensor, v: int, n: int) -> Symmetric:
    """Room for the results."""
    matrix = like.new_empty(v, n, n, dtype=torch.promote_types(like.dtype, torch.float32))
    diagonal, trace, norm = matrix.new_empty(v, n), matrix.new_empty(v), matrix.new_empty(v)
    return Symmetric(matrix, diagonal, trace, norm, matrix.new_empty(v, dtype=torch.int32))


def defined(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Symmetric` by PyTorch, from the lower triangle of matrix [v, n, n]."""
    matrix = matrix.tril() + matrix.tril(-1).mT
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).clone()
    m = matrix.abs().amax(dim=(1, 2)).clamp(SMALLEST, LARGEST)
    norm = m * (matrix / m[:, None, None]).square().sum(dim=(1, 2)).sqrt()
    nonfinite = (~matrix.isfinite()).flatten(1).any(dim=1).to(torch.int32)
    return matrix, diagonal, diagonal.sum(dim=1), norm, nonfinite


def lower_tiles(n: int, block: int) -> int:
    """Number of tiles at or under the diagonal of an n x n matrix."""
    side = triton.cdiv(n, block)
    return side * (side + 1) // 2


def parts(v: int, n: int, K: int, block: Blocks) -> int:
    """In how many chunks to sum a symmetric product."""
    return parts_of(v * lower_tiles(n, block.BLOCK), K, block)


def parts_of(tiles: int, K: int, block: Blocks) -> int:
    """In how many chunks to sum so that all of a device has work, each at least 4 steps long."""
    return max(1, min(PROGRAMS // tiles, K // (4 * block.BLOCK_K), MAX_PARTS))


def chunked(K: int, parts: int, block: Blocks) -> tuple[int, int]:
    """Length of a chunk, in whole steps, and how many of them K terms then make: at most parts."""
    chunk = triton.cdiv(triton.cdiv(K, parts), block.BLOCK_K) * block.BLOCK_K
    return chunk, triton.cdiv(K, chunk)


def padded(X: Tensor) -> Tensor:
    """X or a copy: contiguous, 16-byte aligned, columns a multiple of WIDTH with zeros there."""
    if missing := -X.shape[-1] % WIDTH:  # padding by nothing copies too
        return torch.nn.functional.pad(X, (0, missing)).contiguous()
    X = X.contiguous()
    return X.clone() if X.data_ptr() % 16 else X


def described(**tensors: Tensor | None) -> str:
    """What was found, for a message."""
    given = ((name, X) for name, X in tensors.items() if X is not None)
    return ", ".join(f"{name} {X.dtype} {tuple(X.shape)}" for name, X in given)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _lower_tile(t):
    """Row and column of tile t of a lower triangle, counted along its rows."""
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the root is rounded
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2


@triton.jit
def _terms(
    X_ptr, mean_ptr, z, line, k, stop, rows, W, group,
    COLUMNS: tl.constexpr, CENTER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Terms k, before stop, of these lines of matrix z [rows, W], centered if asked; 0 outside."""
    if COLUMNS:  # a line is a column, its terms go along the rows
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
def multiplied(
    X_ptr, Y_ptr, mean_ptr, z, i, j, start, stop,
    x_rows, x_width, y_rows, y_width, group,
    X_COLUMNS: tl.constexpr, Y_COLUMNS: tl.constexpr, CENTER: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (i, j) of X Y^T in matrix z, of the terms from start to stop: [BLOCK, BLOCK].

    Lines of X by lines of Y, each rows or columns of what `padded` left. Means are of `group` rows.
    """
    a = i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)[:, None]
    b = j * BLOCK + tl.arange(0, BLOCK).to(tl.int64)[:, None]
    k = start + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(start, stop, BLOCK_K):
        x = _terms(X_ptr, mean_ptr, z, a, k, stop, x_rows, x_width, group, X_COLUMNS, CENTER, WIDE)
        y = _terms(Y_ptr, mean_ptr, z, b, k, stop, y_rows, y_width, group, Y_COLUMNS, CENTER, WIDE)
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
    """Lower tile t of matrix z, of the terms in chunk s of the sum."""
    t, s, z = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, j = _lower_tile(t)
    start = s.to(tl.int64) * chunk
    stop = tl.minimum(start + chunk, rows if FEATURES else W)
    acc = multiplied(
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
    """Lower tile t, SUB x SUB, of matrix z: alpha S + beta C + gamma I, S the sum of the parts."""
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
    """Of matrix z, by one program: its tiles' norms are (m, sum of (value / m)^2)."""
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
    *,
    precision: str,
    block: Blocks,
    parts: int,
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
        X, Y: [v, rows, W], as `padded` leaves them.
        precision: of tl.dot, for float32 values.
        parts: largest number of chunks of the sum.
        features: X^T Y, of columns; otherwise X Y^T, of rows.
        mean: subtracted from rows of X and Y, [views, W], one for each `group` rows.
        C: [v, n, n], contiguous.
    """
    v, rows, W = X.shape
    chunk, parts = chunked(rows if features else W, parts, block)
    tiles = lower_tiles(n, block.BLOCK)
    out = empty(X, v, n)
    work = out.matrix.new_empty(v, parts, tiles, block.BLOCK, block.BLOCK)
    # Triton's interpreter multiplies bfloat16 as if its bits were integers.
    wide = mean is not None or (triton.knobs.runtime.interpret and X.dtype == torch.bfloat16)
    _product_kernel[(tiles, parts, v)](
        X, Y, X if mean is None else mean, work, rows, W, group, chunk,
        FEATURES=features, CENTER=mean is not None, WIDE=wide, PRECISION=precision,
        **block._asdict(),
    )  # fmt: skip
    sub = min(FINISH["SUB"], block.BLOCK)
    norms = out.matrix.new_empty(v, lower_tiles(n, sub), 2)
    _finish_kernel[(norms.shape[1], v)](
        work, C, out.matrix, out.diagonal, norms, n, parts, tiles, alpha, beta, gamma,
        BLOCK=block.BLOCK, SUB=sub, num_warps=FINISH["num_warps"],
    )  # fmt: skip
    _totals_kernel[(v,)](
        out.diagonal, norms, out.trace, out.norm, out.nonfinite, n, norms.shape[1], **TOTALS
    )
    return out


def product_variant(X: str, precision: str, block: Blocks, features: bool, center: bool) -> Variant:
    """The product of values of Triton type X (a pointer)."""
    types = {"X_ptr": X, "Y_ptr": X, "mean_ptr": FP32 if center else X, "work_ptr": FP32}
    types |= {"rows": "i32", "W": "i32:16", "group": "i32", "chunk": "i32:16"}
    constants = {
        "FEATURES": features, "CENTER": center, "WIDE": center, "PRECISION": precision,
        "BLOCK": block.BLOCK, "BLOCK_K": block.BLOCK_K,
    }  # fmt: skip
    tensor_cores = precision != "ieee" or (X != FP32 and not center)
    options = (block.num_warps, block.num_stages)
    return Variant(_product_kernel, types, constants, *options, tensor_cores=tensor_cores)


def finish_variant(block: Blocks, affine: bool) -> Variant:
    """With beta C, if affine; alpha and gamma are always there."""
    types = dict.fromkeys(("work_ptr", "out_ptr", "diagonal_ptr", "norms_ptr"), FP32)
    types |= dict.fromkeys(("n", "parts", "tiles"), "i32")
    types |= dict.fromkeys(("alpha", "beta", "gamma"), "fp32")
    types |= {"C_ptr": FP32} if affine else {}
    constants: dict[str, int | None] = {"BLOCK": block.BLOCK, "SUB": FINISH["SUB"]}
    constants |= {} if affine else {"C_ptr": None}
    return Variant(_finish_kernel, types, constants, FINISH["num_warps"])


def variants() -> list[Variant]:
    """Of the totals; the ops that make the others list them."""
    types = dict.fromkeys(("diagonal_ptr", "norms_ptr", "trace_ptr", "norm_ptr"), FP32)
    types |= {"nonfinite_ptr": "*i32", "n": "i32", "tiles": "i32"}
    return [Variant(_totals_kernel, types, {"BLOCK": TOTALS["BLOCK"]}, TOTALS["num_warps"])]
