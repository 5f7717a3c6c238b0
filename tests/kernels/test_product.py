"""rdm_kernels.product against float64, for its definition and for its kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels import product
from rdm_kernels.product import (
    DTYPES,
    PRECISIONS,
    blocks,
    dot_precision,
    launch,
    lines,
    product_op,
    product_triton,
    variants,
)
from rdm_kernels.tiles import LARGE, Blocks
from rdm_kernels.variant import POINTERS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
U = 2.0**-24  # unit roundoff of float32
HALF = 2.0**-11  # and of float16, whose smallest number is 2^-24
SMALL = Blocks(16, 16, 4, 2)  # several tiles even of matrices that are quick to interpret


def kernel(*args: Any) -> Tensor:
    return launch(*args, SMALL, 1)


def in_parts(*args: Any) -> Tensor:
    return launch(*args, SMALL, 3)


BODIES = pytest.mark.parametrize(
    "body", [product_op, kernel, in_parts], ids=["definition", "kernel", "split"]
)
Body = Callable[..., Tensor]

sizes = st.sampled_from([1, 2, 15, 16, 17, 33, 50])
numbers = st.sampled_from([1.0, -1.875, 0.375, 3.4445])
layouts = st.sampled_from(["rows", "columns", "strided"])
seeds = st.integers(0, 2**31)


def matrix(v: int, m: int, n: int, layout: str = "rows", seed: int = 0) -> Tensor:
    """The same values in any layout."""
    X = torch.randn(v, m, n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    if layout == "columns":
        return X.mT.contiguous().mT
    if layout == "strided":
        wide = X.new_full((v, m, 2 * n + 1), torch.nan)
        wide[:, :, 1::2] = X
        return wide[:, :, 1::2]
    return X


def formula(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """In float64, and the error that product.py allows each element."""
    dtype = A.dtype
    A, B = A.double(), B.double()
    C = A.new_zeros(()) if C is None else C.double()
    D = alpha * A @ B + beta * C
    unit = abs(alpha) * A.norm(dim=2)[:, :, None] * B.norm(dim=1)[:, None, :]
    split = 12 if dtype == torch.float32 else 0  # the interpreter's products are exact
    allowed = (A.shape[2] + 2 + split) * U * unit + 2 * U * (unit + (beta * C).abs())
    rounding = HALF * (D.abs() + allowed) + 2.0**-25 if dtype == torch.float16 else 0
    return D, allowed + rounding


@BODIES
@settings(max_examples=40)
@given(
    v=st.integers(1, 2), m=sizes, k=sizes, n=sizes, dtype=st.sampled_from(DTYPES[:2]),
    A_layout=layouts, B_layout=layouts, alpha=numbers, beta=numbers, third=st.booleans(),
    seed=seeds,
)  # fmt: skip
def test_elements_are_within_the_bound_of_float64(
    v: int,
    m: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    A_layout: str,
    B_layout: str,
    alpha: float,
    beta: float,
    third: bool,
    seed: int,
    body: Body,
) -> None:
    A = matrix(v, m, k, A_layout, seed).to(dtype)
    B = matrix(v, k, n, B_layout, seed + 1).to(dtype)
    C = matrix(v, m, n, "rows", seed + 2).to(dtype) if third else None
    found = body(A, B, C, alpha, beta, "tf32x3")
    D, allowed = formula(A, B, C, alpha, beta)
    assert found.dtype == dtype and found.shape == (v, m, n) and found.is_contiguous()
    assert ((found - D).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("shape", [(70, 140, 40), (40, 300, 130)], ids=str)
def test_block_sizes_of_the_launcher_cover_several_tiles(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Which splits the sum, as there are few tiles."""
    m, k, n = shape
    A, B, C = (matrix(2, *s).to(dtype) for s in ((m, k), (k, n), (m, n)))
    found = product_triton(A, B, C, -1.0, 0.5, "tf32x3")
    D, allowed = formula(A, B, C, -1.0, 0.5)
    assert ((found - D).abs() <= allowed).all()


@BODIES
def test_a_layout_changes_no_bit_and_the_last_parts_are_not_lost(body: Body) -> None:
    A, B = matrix(2, 20, 50), matrix(2, 50, 18)
    plain = body(A, B, None, 1.0, 0.0, "tf32")
    for a in ("rows", "columns", "strided"):
        for b in ("rows", "columns", "strided"):
            found = body(matrix(2, 20, 50, a), matrix(2, 50, 18, b), None, 1.0, 0.0, "tf32")
            if body is not product_op:
                assert torch.equal(found, plain)
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [16, 32, 48])
def test_a_transposed_view_is_read_in_place(k: int) -> None:
    X = matrix(2, 48, k)
    for view, columns in ((X, False), (X.mT, True)):
        found, found_columns = lines(view)
        assert found.data_ptr() == X.data_ptr() and found_columns == columns
    copied, columns = lines(X[:, :, :-1])
    assert copied.data_ptr() != X.data_ptr() and not columns and copied.shape == X.shape


def test_what_lies_beyond_a_view_is_not_read() -> None:
    """A misaligned view of a larger store of NaN, in both layouts."""
    store = torch.full((2 * 32 * 33 + 1,), torch.nan, device=DEVICE)
    for transposed in (False, True):
        A = store.clone()[1:].view(2, 32, 33)[:, :, :32]
        A = A.mT if transposed else A
        A.copy_(matrix(2, 32, 32))
        assert torch.equal(kernel(A, A, None, 1.0, 0.0, "tf32"), kernel(
            matrix(2, 32, 32), matrix(2, 32, 32), None, 1.0, 0.0, "tf32"
        ))  # fmt: skip


def test_float64_is_computed_in_float64() -> None:
    A, B, C = (matrix(2, 20, 20, seed=i).double() for i in range(3))
    expected = -2 * A @ B + 3 * C
    for found in (
        product(A, B, C=C, alpha=-2.0, beta=3.0),
        product_triton(A, B, C, -2.0, 3.0, "tf32"),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_nothing_of_what_is_given_is_written_to_and_no_gradient_is_taken() -> None:
    A, B, C = (matrix(1, 20, 20, seed=i).requires_grad_() for i in range(3))
    before = [x.detach().clone() for x in (A, B, C)]
    assert not product(A, B, C=C, beta=2.0).requires_grad
    kernel(A.detach(), B.detach(), C.detach(), 1.0, 2.0, "tf32")
    assert all(torch.equal(x, y) for x, y in zip((A, B, C), before, strict=True))


def test_autocast_does_not_lower_the_precision() -> None:
    A = matrix(1, 64, 64)
    plain = product(A, A)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(product(A, A), plain)


def test_op_is_registered_correctly() -> None:
    A, B, C = matrix(2, 5, 7), matrix(2, 7, 3), matrix(2, 5, 3)
    torch.library.opcheck(product_op, (A, B, C, 1.0, 2.0, "tf32"))
    torch.library.opcheck(product_op, (A, B, None, 1.0, 0.0, "tf32"))


def test_every_block_of_the_launcher_is_listed() -> None:
    listed = {
        (v.types["X_ptr"], v.constants["PRECISION"], v.constants["BLOCK"], v.constants["BLOCK_K"],
         v.num_warps, v.num_stages)
        for v in variants()
        if v.name == "_general_product_kernel"
    }  # fmt: skip
    for name in ("float16", "float32"):
        dtype = getattr(torch, name)
        for precision in PRECISIONS:
            for elements in (1, 512**2, 2 * 512 * 2048, LARGE**2, 8192**2):
                dot = dot_precision(dtype, precision)
                assert (POINTERS[name], dot, *blocks(dtype, elements)) in listed


@pytest.mark.parametrize(
    ("A", "B", "options", "message"),
    [
        (torch.zeros(4, 4), torch.zeros(4, 4), {}, r"got A torch.float32 \(4, 4\)"),
        (torch.zeros(1, 4, 5), torch.zeros(1, 4, 5), {}, r"\(1, 4, 5\), B torch.float32"),
        (torch.zeros(1, 4, 4), torch.zeros(2, 4, 4), {}, r"\(2, 4, 4\)"),
        (torch.zeros(1, 0, 4), torch.zeros(1, 4, 4), {}, "non-empty"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).half(), {}, "float16"),
        (torch.zeros(1, 4, 4).int(), torch.zeros(1, 4, 4).int(), {}, "int32"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), {"C": torch.zeros(1, 4, 5)}, r"\(1, 4, 5\)"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), {"precision": "fast"}, "'fast'"),
    ],
    ids=["2d", "inner", "batch", "empty", "dtypes", "dtype", "C", "precision"],
)
def test_what_does_not_fit_is_named(
    A: Tensor, B: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        product(A, B, **options)
