"""General matrix products with explicit precision.

    D = alpha A B + beta C

What the iterations of polar.py and matrix_function.py multiply that is not symmetric; what is, is
`sym_matmul`'s. Each operand is read as it lies, by rows or by columns, so a transposed view costs
no copy.

Error of an element, in units of |alpha| |A_i| |B_j| (row, column), k terms summed, u = 2^-24;
adding beta C rounds by 2 u more:

    float32, "tf32x3"    (k + 2) u + 12 u    three products of 10-bit significands on tensor cores
    float32, "tf32"      (k + 2) u + 2^-10   one
    float16              (k + 2) u           then the result is rounded to float16, once

The op `rdm::product` is *defined* by its PyTorch body below, whatever the precision: float16 is
multiplied in float32, float32 and float64 as they are. Triton registers itself as that op's CUDA
kernel for float16 and float32; float64 is computed by the body on every device. Nothing here reads
PyTorch's global switches of precision on CUDA, and no atomics are used: the same input gives the
same bits.
"""

import itertools
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.tiles import LARGE, Blocks, chunked, described, multiplied, padded, parts_of
from rdm_kernels.variant import POINTERS, Variant

DTYPES = (torch.float16, torch.float32, torch.float64)
PRECISIONS = ("tf32x3", "tf32")


def product(
    A: Tensor,
    B: Tensor,
    *,
    C: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    precision: Literal["tf32x3", "tf32"] = "tf32x3",
) -> Tensor:
    """alpha A B + beta C of each matrix of a batch.

    Args:
        A: [v, m, k], float16, float32 or float64. Takes no gradient.
        B: [v, k, n], same dtype. A contiguous A or B, or its transpose, is read in place.
        C: [v, m, n], same dtype, or None for none. beta = 0 does not stop its NaN.
        alpha, beta: numbers.
        precision: how products of float32 are formed on CUDA.

    Returns:
        [v, m, n] in the operands' dtype, contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit, a size is 0, or precision is unknown.
    """
    matrices = (A, B) if C is None else (A, B, C)
    fit = A.ndim == B.ndim == 3 and A.shape[::2] == (B.shape[0], B.shape[1])
    fit = fit and (C is None or C.shape == (*A.shape[:2], B.shape[2]))
    fit = fit and all(X.numel() for X in matrices)
    if not fit or A.dtype not in DTYPES or len({X.dtype for X in matrices}) > 1:
        raise ValueError(
            "product needs non-empty A [v, m, k], B [v, k, n] and C [v, m, n] of one dtype, "
            f"float16, float32 or float64, got {described(A=A, B=B, C=C)}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f'product knows precision "tf32x3" and "tf32", got {precision!r}')
    C = None if C is None else C.detach()
    with torch.autocast(A.device.type, enabled=False):
        return product_op(A.detach(), B.detach(), C, alpha, beta, precision)


# ---- the op, defined by its body -------------------------------------------------------------


@torch.library.custom_op("rdm::product", mutates_args=())
def product_op(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, precision: str
) -> Tensor:
    """[v, m, n]"""
    return _body(A, B, C, alpha, beta)


def _body(A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float) -> Tensor:
    wide = torch.promote_types(A.dtype, torch.float32)
    D = alpha * (A.to(wide) @ B.to(wide))
    return (D if C is None else D + beta * C.to(wide)).to(A.dtype)


@product_op.register_fake
def _(A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, precision: str) -> Tensor:
    return A.new_empty(A.shape[0], A.shape[1], B.shape[2])


# ---- the Triton kernel ---------------------------------------------------------------------------


@triton.jit(do_not_specialize=["m", "n", "x_rows", "y_rows"])
def _general_product_kernel(
    X_ptr, Y_ptr, out_ptr,
    m, n, x_rows, x_width, y_rows, y_width, chunk, alpha,
    X_COLUMNS: tl.constexpr, Y_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile t of matrix z, of the terms in chunk s of the sum: alpha X Y^T."""
    t, s, z = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    across = tl.cdiv(n, BLOCK)
    i, j = t // across, t % across
    start = s * chunk
    stop = tl.minimum(start + chunk, x_rows if X_COLUMNS else x_width)
    acc = alpha * multiplied(
        X_ptr, Y_ptr, X_ptr, z, i, j, start, stop, x_rows, x_width, y_rows, y_width, 1,
        X_COLUMNS, Y_COLUMNS, False, False, PRECISION, BLOCK, BLOCK_K,
    )  # fmt: skip
    # Offsets in a tile are 32 bits wide: with 64, those of all its elements would spill.
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    out_ptr += ((z * tl.num_programs(1) + s) * m + i * BLOCK) * n + j * BLOCK
    inside = (r < m - i * BLOCK) & (c < n - j * BLOCK)
    tl.store(out_ptr + (r * n + c), acc.to(out_ptr.dtype.element_ty), mask=inside)


# ---- block sizes and launchers -------------------------------------------------------------------


def blocks(dtype: torch.dtype, elements: int) -> Blocks:
    """Block sizes for results of so many elements in all."""
    if dtype == torch.float16:
        return Blocks(128, 64, 8, 3) if elements >= LARGE**2 else Blocks(64, 64, 8, 4)
    return Blocks(128, 16, 8, 2) if elements >= LARGE**2 else Blocks(64, 32, 8, 3)


def lines(X: Tensor) -> tuple[Tensor, bool]:
    """X [v, lines, terms], or its transpose if that is how it lies in memory, and which: padded."""
    columns = X.mT.is_contiguous() and not X.is_contiguous()
    return padded(X.mT if columns else X), columns


@product_op.register_kernel("cuda")
def product_triton(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, precision: str
) -> Tensor:
    if A.dtype == torch.float64:
        return _body(A, B, C, alpha, beta)
    (v, m, k), n = A.shape, B.shape[2]
    block = blocks(A.dtype, v * m * n)
    tiles = v * triton.cdiv(m, block.BLOCK) * triton.cdiv(n, block.BLOCK)
    return launch(A, B, C, alpha, beta, precision, block, parts_of(tiles, k, block))


def launch(
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    alpha: float,
    beta: float,
    precision: str,
    block: Blocks,
    parts: int,
) -> Tensor:
    """The op by its kernel, with these block sizes, summed in at most so many parts."""
    (v, m, _), n = A.shape, B.shape[2]
    (X, x_columns), (Y, y_columns) = lines(A), lines(B.mT)
    chunk, parts = chunked(X.shape[1] if x_columns else X.shape[2], parts, block)
    alone = parts == 1 and C is None
    out = A.new_empty(v, parts, m, n, dtype=A.dtype if alone else torch.float32)
    tiles = triton.cdiv(m, block.BLOCK) * triton.cdiv(n, block.BLOCK)
    _general_product_kernel[(tiles, parts, v)](
        X, Y, out, m, n, *X.shape[1:], *Y.shape[1:], chunk, alpha,
        X_COLUMNS=x_columns, Y_COLUMNS=y_columns, PRECISION=dot_precision(A.dtype, precision),
        **block._asdict(),
    )  # fmt: skip
    D = out[:, 0] if parts == 1 else out.sum(dim=1)  # PyTorch adds the parts in one order
    return (D if C is None else D.add_(C, alpha=beta)).to(A.dtype)


def dot_precision(dtype: torch.dtype, precision: str) -> str:
    """How tiles are multiplied: of 16-bit values as they are, products being exact anyway."""
    return precision if dtype == torch.float32 else "ieee"


def variants() -> list[Variant]:
    """Of every product that `blocks` may choose; one that is added to comes as float32."""
    found = []
    for name, elements, x_columns, y_columns in itertools.product(
        ("float16", "float32"), (LARGE**2 - 1, LARGE**2), (False, True), (False, True)
    ):
        block = blocks(getattr(torch, name), elements)
        types = {"X_ptr": POINTERS[name], "Y_ptr": POINTERS[name], "alpha": "fp32"}
        types |= dict.fromkeys(("m", "n", "x_rows", "y_rows"), "i32")
        types |= dict.fromkeys(("x_width", "y_width", "chunk"), "i32:16")
        for precision, out in itertools.product(PRECISIONS, sorted({name, "float32"})):
            constants = {
                "X_COLUMNS": x_columns, "Y_COLUMNS": y_columns,
                "PRECISION": dot_precision(getattr(torch, name), precision),
                "BLOCK": block.BLOCK, "BLOCK_K": block.BLOCK_K,
            }  # fmt: skip
            found.append(
                Variant(
                    _general_product_kernel,
                    types | {"out_ptr": POINTERS[out]},
                    constants,
                    block.num_warps,
                    block.num_stages,
                    tensor_cores=True,
                )
            )
    return found
