"""General matrix products in full float32 precision.

    D = alpha A B + beta C

For products that are not symmetric; the others are `sym_matmul`'s. Each operand is read by rows or
by columns, so a transposed view costs no copy.

Error of an element in float32: (k + 14) u |alpha| |A_i| |B_j| for row A_i and column B_j of k
terms, u = 2^-24, and 2 u of the sum of the magnitudes of both terms. Products are formed by tf32x3,
three products of 10-bit significands on tensor cores.

`rdm::product` is defined by its PyTorch body; a Triton kernel replaces it on CUDA for float32. The
kernel ignores PyTorch's global precision switches and uses no atomics: the same input gives the
same bits.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.ops import cuda_launcher, define_op, describe
from rdm_kernels.tiles import FULL, Blocks, chunks, multiply_tile, num_parts, pad_rows
from rdm_kernels.variant import FP32, Variant

DTYPES = (torch.float32, torch.float64)


def product(
    A: Tensor,
    B: Tensor,
    *,
    C: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """alpha A B + beta C for each matrix of a batch.

    Args:
        A: [v, m, k], float32 or float64, not empty. Takes no gradient.
        B: [v, k, n], same dtype. A contiguous A or B, or its transpose, is read in place.
        C: [v, m, n], same dtype, or None for no C. beta = 0 does not hide its NaN.
        alpha, beta: numbers.

    Returns:
        [v, m, n] in the operands' dtype, contiguous.

    Raises:
        ValueError: the shapes or dtypes of A, B and C do not fit.
    """
    matrices = (A, B) if C is None else (A, B, C)
    fit = A.ndim == B.ndim == 3 and A.shape[::2] == (B.shape[0], B.shape[1])
    fit = fit and (C is None or C.shape == (*A.shape[:2], B.shape[2]))
    fit = fit and all(X.numel() for X in matrices)
    if not fit or A.dtype not in DTYPES or len({X.dtype for X in matrices}) > 1:
        raise ValueError(
            "product needs non-empty A [v, m, k], B [v, k, n] and C [v, m, n] of one dtype, "
            f"float32 or float64, got {describe(A=A, B=B, C=C)}"
        )
    C = None if C is None else C.detach()
    with torch.autocast(A.device.type, enabled=False):
        return product_op(A.detach(), B.detach(), C, alpha, beta)


def define_product(A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float) -> Tensor:
    D = alpha * (A @ B)
    return D if C is None else D + beta * C


product_op = define_op("product", define_product)


# ---- the Triton kernel ---------------------------------------------------------------------------


@triton.jit(do_not_specialize=["m", "n", "x_rows", "y_rows"])
def _general_product_kernel(
    X_ptr, Y_ptr, out_ptr,
    m, n, x_rows, x_width, y_rows, y_width, chunk, alpha,
    X_COLUMNS: tl.constexpr, Y_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile t of alpha X Y^T in matrix z, summed over chunk s."""
    t, s, z = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    across = tl.cdiv(n, BLOCK)
    i, j = t // across, t % across
    start = s * chunk
    stop = tl.minimum(start + chunk, x_rows if X_COLUMNS else x_width)
    acc = alpha * multiply_tile(
        X_ptr, Y_ptr, X_ptr, z, i, j, start, stop, x_rows, x_width, y_rows, y_width, 1,
        X_COLUMNS, Y_COLUMNS, False, False, "tf32x3", BLOCK, BLOCK_K,
    )  # fmt: skip
    # Offsets within a tile have 32 bits: 64-bit ones for all its elements would spill.
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    out_ptr += ((z * tl.num_programs(1) + s) * m + i * BLOCK) * n + j * BLOCK
    inside = (r < m - i * BLOCK) & (c < n - j * BLOCK)
    tl.store(out_ptr + (r * n + c), acc, mask=inside)


# ---- launcher --------------------------------------------------------------------


def as_lines(X: Tensor) -> tuple[Tensor, bool]:
    """Padded X [v, lines, terms], or its transpose if that is contiguous, and whether it is."""
    columns = X.mT.is_contiguous() and not X.is_contiguous()
    return pad_rows(X.mT if columns else X), columns


@cuda_launcher(product_op)
def product_triton(
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    alpha: float,
    beta: float,
    block: Blocks = FULL,
    parts: int | None = None,
) -> Tensor:
    """`define_product` by the kernel, in these blocks and at most so many parts of the sum."""
    if A.dtype == torch.float64:
        return define_product(A, B, C, alpha, beta)
    (v, m, k), n = A.shape, B.shape[2]
    (X, x_columns), (Y, y_columns) = as_lines(A), as_lines(B.mT)
    tiles = triton.cdiv(m, block.BLOCK) * triton.cdiv(n, block.BLOCK)
    parts = parts or num_parts(v * tiles, k, block)
    chunk, parts = chunks(X.shape[1] if x_columns else X.shape[2], parts, block)
    out = A.new_empty(v, parts, m, n)
    _general_product_kernel[(tiles, parts, v)](
        X, Y, out, m, n, *X.shape[1:], *Y.shape[1:], chunk, alpha,
        X_COLUMNS=x_columns, Y_COLUMNS=y_columns, **block._asdict(),
    )  # fmt: skip
    D = out[:, 0] if parts == 1 else out.sum(dim=1)  # PyTorch adds the parts in a fixed order
    return D if C is None else D.add_(C, alpha=beta)


def variants() -> list[Variant]:
    """Every layout of the operands."""
    types = dict.fromkeys(("X_ptr", "Y_ptr", "out_ptr"), FP32) | {"alpha": "fp32"}
    types |= dict.fromkeys(("m", "n", "x_rows", "y_rows"), "i32")
    types |= dict.fromkeys(("x_width", "y_width", "chunk"), "i32:16")
    return [
        Variant(
            _general_product_kernel,
            types,
            {"X_COLUMNS": x_columns, "Y_COLUMNS": y_columns, **FULL._asdict()},
            tensor_cores=True,
        )
        for x_columns, y_columns in itertools.product((False, True), repeat=2)
    ]
