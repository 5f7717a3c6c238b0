"""rdm_kernels.product against float64: its definition and its kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels.product import as_lines, product_op, product_triton
from tests.kernels.common import Body, bodies, randn, roundoff

BODIES = bodies(product_op, product_triton)
sizes = st.sampled_from([1, 2, 15, 16, 17, 33])
numbers = st.sampled_from([1.0, -1.875, 0.375, 3.4445])


def check(found: Tensor, A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float) -> None:
    """Elements against float64, within the bound that product.py states."""
    assert found.dtype == A.dtype
    u, A, B = roundoff(A), A.double(), B.double()
    C = A.new_zeros(()) if C is None else C.double()
    unit = abs(alpha) * A.norm(dim=2)[:, :, None] * B.norm(dim=1)[:, None, :]
    allowed = (A.shape[2] + 14) * u * unit + 2 * u * (unit + (beta * C).abs())
    assert ((found - (alpha * A @ B + beta * C)).abs() <= allowed).all()


@BODIES
@settings(max_examples=25)
@given(
    v=st.integers(1, 2), m=sizes, k=sizes, n=sizes, columns=st.booleans(), alpha=numbers,
    beta=numbers, third=st.booleans(), seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_elements_are_within_their_bound(
    v: int, m: int, k: int, n: int, columns: bool, alpha: float, beta: float, third: bool,
    seed: int, dtype: torch.dtype, body: Body,
) -> None:  # fmt: skip
    """In float32, and in float64 for float64."""
    A, B = randn(v, m, k, seed=seed, dtype=dtype), randn(v, k, n, seed=seed + 1, dtype=dtype)
    B = B.mT.contiguous().mT if columns else B
    C = randn(v, m, n, seed=seed + 2, dtype=dtype) if third else None
    check(body(A, B, C, alpha, beta), A, B, C, alpha, beta)


@pytest.mark.parametrize(("m", "k", "n"), [(70, 140, 40), (40, 1100, 70)])
def test_the_launchers_own_blocks_cover_several_tiles(m: int, k: int, n: int) -> None:
    """The long sum is split."""
    A, B, C = randn(2, m, k), randn(2, k, n), randn(2, m, n)
    check(product_triton(A, B, C, -1.0, 0.5), A, B, C, -1.0, 0.5)


@pytest.mark.parametrize("k", [16, 32, 48])
def test_a_transposed_view_is_read_in_place(k: int) -> None:
    X = randn(2, 48, k)
    for view, columns in ((X, False), (X.mT, True)):
        found, found_columns = as_lines(view)
        assert found.data_ptr() == X.data_ptr() and found_columns == columns
    copied, columns = as_lines(X[:, :, :-1])
    assert copied.data_ptr() != X.data_ptr() and not columns and copied.shape == X.shape
