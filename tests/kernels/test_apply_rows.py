"""rdm_kernels.apply_rows against float64: its definition and its kernels."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels.apply_rows import Tiles, apply_rows, apply_rows_triton, blocks
from rdm_kernels.tiles import PROGRAMS
from tests.kernels.common import DEVICE, INTERPRETED, Body, U

NARROW = (torch.float16, torch.bfloat16, torch.float32)
kernel = partial(apply_rows_triton, block=Tiles(16, 16, 16, 4, 2))  # quick to interpret
BODIES = pytest.mark.parametrize("body", [apply_rows, kernel], ids=["definition", "kernel"])

shapes = st.tuples(
    st.integers(1, 2),
    st.sampled_from([1, 2, 15, 16, 17]),
    st.sampled_from([1, 2, 15, 16, 17, 33]),
    st.sampled_from([1, 3, 16, 31, 33]),
)
dtypes = st.sampled_from(NARROW)
seeds = st.integers(0, 2**31)


def case(v: int, b: int, k: int, D: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """N, X, scale and loss. N's elements are of very different sizes, as those of a gradient."""
    generator = torch.Generator().manual_seed(seed)
    N = torch.randn(v, b, k, generator=generator)
    N = N * 10 ** (4 * torch.rand(v, b, k, generator=generator) - 2)
    X = torch.randn(v, k, D, generator=generator).to(dtype)
    scale, loss = torch.randn(2, v, generator=generator)
    return [x.to(DEVICE) for x in (N, X, scale, loss)]


def check(found: Tensor, N: Tensor, X: Tensor | None, scale: Tensor, dtype: torch.dtype) -> None:
    """Against float64, within the bound that apply_rows.py states and the rounding to dp's dtype.

    Triton's interpreter multiplies exactly, but truncates where a device rounds to bfloat16.
    """
    N, scale, k = N.double(), scale.double()[:, None, None], N.shape[2]
    if X is None:
        expected, error = scale * N, 2 * U * (scale * N).abs()
    else:
        terms = {
            torch.bfloat16: 2.0 ** (-14 if INTERPRETED else -16) + (2 * k + 3) * U,
            torch.float16: 2.0**-20 + (2 * k + 3) * U,
            torch.float32: 12 * U + (k + 3) * U,
        }
        expected = scale * (N @ X.double())
        error = terms[X.dtype] * scale.abs() * (N.abs() @ X.double().abs())
    info = torch.finfo(dtype)
    roundoff = info.eps if dtype == torch.bfloat16 and INTERPRETED else info.eps / 2
    allowed = error + roundoff * (expected.abs() + error) + info.smallest_normal * info.eps
    assert found.dtype == dtype
    in_range = expected.abs() < info.max
    assert ((found.double() - expected).abs() <= allowed)[in_range].all()


@BODIES
@settings(max_examples=45)
@given(shape=shapes, kind=st.sampled_from([*NARROW, None, "wide"]), dtype=dtypes, seed=seeds)
def test_elements_are_within_their_bound(
    shape: tuple[int, int, int, int], kind: Any, dtype: torch.dtype, seed: int, body: Body
) -> None:
    """Of X in a dtype, or without X, with coefficients in float32 or in float64."""
    with_X = kind in NARROW
    N, X, scale, loss = case(*shape, kind if with_X else torch.float32, seed)
    N, scale, loss = (x.double() if kind == "wide" else x for x in (N, scale, loss))
    X = X if with_X else None
    check(body(N, X, scale, loss, dtype), N, X, scale, dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("D", [1, 128 * PROGRAMS], ids=["small", "large"])
def test_the_launchers_own_tiles_cover_rows_of_several_tiles(dtype: torch.dtype, D: int) -> None:
    N, X, scale, loss = case(1, 2 if D > 1 else 70, 70, 144, dtype)
    block = blocks(dtype, 1, 1, D)
    found = apply_rows_triton(N, X, scale, loss, torch.float32, block)
    check(found, N, X, scale, torch.float32)


@BODIES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_coefficients_may_leave_float16s_range(size: float, dtype: torch.dtype, body: Body) -> None:
    N, X, scale, loss = case(1, 5, 17, 20, dtype)
    check(body(N * size, X, scale, loss, torch.float32), N * size, X, scale, torch.float32)


@BODIES
def test_coefficients_rows_or_all_of_them_may_be_float64(body: Body) -> None:
    N, X, scale, loss = case(2, 5, 17, 20, torch.bfloat16)
    wide = (N.double(), X, scale.double(), loss.double())
    check(body(*wide, torch.float32), N, X, scale, torch.float32)
    expected = scale.double()[:, None, None] * (N.double() @ X.double())
    torch.testing.assert_close(body(*wide, torch.float64), expected, atol=0, rtol=1e-13)
    X = X.float()
    check(body(N, X.double(), scale, loss, torch.float32), N, X, scale, torch.float32)


@BODIES
@pytest.mark.parametrize("with_X", [True, False], ids=["X", "identity"])
def test_without_a_loss_the_rows_are_as_they_are(with_X: bool, body: Body) -> None:
    N, X, scale, loss = case(2, 5, 17, 20, torch.bfloat16)
    N[1, 2, 3] = torch.nan
    rows = X if with_X else None
    found, checked = (body(N, rows, scale, x, torch.float32) for x in (None, loss))
    torch.testing.assert_close(found, checked, rtol=0, atol=0, equal_nan=True)
    assert found[1, 2].isnan().any()


@BODIES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("with_X", [True, False], ids=["X", "identity"])
def test_a_view_with_a_loss_not_finite_gets_zeros(with_X: bool, bad: float, body: Body) -> None:
    N, X, scale, loss = case(3, 5, 17, 20, torch.bfloat16)
    rows = X if with_X else None
    good = body(N, rows, scale, loss, torch.float32)
    N[1, 2, 3] = X[1, 4, 5] = scale[1] = torch.nan
    loss[1] = bad
    found = body(N, rows, scale, loss, torch.float32)
    assert (found[1] == 0).all() and torch.equal(found[[0, 2]], good[[0, 2]])
