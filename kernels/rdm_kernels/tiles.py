"""What kernels over matrices in square tiles share: numbering, mirrored stores, norms.

A symmetric matrix is computed in the tiles of its lower triangle, and each element at or under
the diagonal is stored twice, so the result equals its transpose bit for bit whatever the order
of sums in a tile was. With its tile a program leaves a scaled sum of squares; one program per
matrix then adds them in tile order. No atomics: the same input gives the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.variant import Variant

# Sums of squares are of values divided by the largest of a tile, itself held in this range, so
# that they neither overflow nor vanish wherever the values themselves do not.
SMALLEST, LARGEST = 1e-30, 1e30
_LOW, _HIGH = tl.constexpr(SMALLEST), tl.constexpr(LARGEST)


def lower_tiles(n: int, block: int) -> int:
    """Number of tiles at or under the diagonal of an n x n matrix."""
    side = triton.cdiv(n, block)
    return side * (side + 1) // 2


@triton.jit
def lower_tile(t):
    """Row and column of tile t of a lower triangle, counted along its rows."""
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the root is rounded
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2


@triton.jit
def store_norm(values, weight, norms_ptr):
    """Largest magnitude m of a tile, kept in range, and sum of weight (values / m)^2."""
    m = tl.max(tl.max(tl.abs(values), axis=1), axis=0)
    m = tl.minimum(tl.maximum(m, _LOW), _HIGH)
    scaled = values * (1.0 / m)
    tl.store(norms_ptr, m)
    tl.store(norms_ptr + 1, tl.sum(tl.sum(weight * scaled * scaled, axis=1), axis=0))


@triton.jit
def store_symmetric(acc, i, j, C_ptr, diagonal_ptr, norms_ptr, n, BLOCK: tl.constexpr):
    """Store tile (i, j), j <= i, its mirror image, what it has of the diagonal, and its norm."""
    rows = i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    cols = j * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    r, c = rows[:, None], cols[None, :]
    tl.store(C_ptr + r * n + c, acc, mask=(c <= r) & (r < n))
    mirrored = (cols[:, None] < rows[None, :]) & (rows[None, :] < n)
    tl.store(C_ptr + cols[:, None] * n + rows[None, :], tl.trans(acc), mask=mirrored)
    if i == j:
        diagonal = tl.sum(tl.where(r == c, acc, 0.0), axis=1)
        tl.store(diagonal_ptr + rows, diagonal, mask=rows < n)
    weight = tl.where(r == c, 1.0, 2.0)
    store_norm(tl.where((c <= r) & (r < n), acc, 0.0), weight, norms_ptr)


@triton.jit
def _totals_kernel(
    diagonal_ptr, norms_ptr, trace_ptr, norm_ptr, nonfinite_ptr,
    n, tiles, BLOCK: tl.constexpr,
):  # fmt: skip
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


_TOTALS = {"BLOCK": 512, "num_warps": 4}


def totals(diagonal: Tensor, norms: Tensor, trace: Tensor, norm: Tensor, flag: Tensor) -> None:
    """Write trace [v], Frobenius norm [v] and flag of non-finite values [v, int32].

    Args:
        diagonal: [v, n] float32.
        norms: what `store_norm` left, [v, tiles, 2] float32.
        trace, norm, flag: written.
    """
    v, n = diagonal.shape
    _totals_kernel[(v,)](diagonal, norms, trace, norm, flag, n, norms.shape[1], **_TOTALS)


def variants() -> list[Variant]:
    types = dict.fromkeys(("diagonal_ptr", "norms_ptr", "trace_ptr", "norm_ptr"), "*fp32")
    types |= {"nonfinite_ptr": "*i32", "n": "i32", "tiles": "i32"}
    return [Variant(_totals_kernel, types, {"BLOCK": _TOTALS["BLOCK"]}, _TOTALS["num_warps"])]
