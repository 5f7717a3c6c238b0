"""rdm_kernels.apply_rows against float64, for its definition and for its kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels.apply_rows import (
    Tiles,
    apply_rows,
    apply_rows_triton,
    blocks,
    launch,
    variants,
)
from rdm_kernels.tiles import PROGRAMS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
U = 2.0**-24  # unit roundoff of float32
INTERPRETED = triton.knobs.runtime.interpret
SMALL = Tiles(16, 16, 16, 4, 2)  # several tiles even of matrices that are quick to interpret
NARROW = (torch.float16, torch.bfloat16, torch.float32)


def kernel(*args: Any) -> Tensor:
    return launch(*args, SMALL)


BODIES = pytest.mark.parametrize("body", [apply_rows, kernel], ids=["definition", "kernel"])
Body = Callable[..., Tensor]

shapes = st.tuples(
    st.integers(1, 3),
    st.sampled_from([1, 2, 15, 16, 17, 40]),
    st.sampled_from([1, 2, 15, 16, 17, 50]),
    st.sampled_from([1, 3, 16, 31, 33, 64]),
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


def allowed(N: Tensor, X: Tensor, scale: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The error that apply_rows.py allows each element, and the rounding to dp's dtype.

    Triton's interpreter multiplies exactly, but truncates where a device rounds to bfloat16.
    """
    k = N.shape[2]
    terms = {
        torch.bfloat16: 2.0 ** (-14 if INTERPRETED else -16) + (2 * k + 3) * U,
        torch.float16: 2.0**-20 + (2 * k + 3) * U,
        torch.float32: 12 * U + (k + 3) * U,
    }
    unit = scale.double().abs()[:, None, None] * (N.double().abs() @ X.double().abs())
    info = torch.finfo(dtype)
    roundoff = info.eps if dtype == torch.bfloat16 and INTERPRETED else info.eps / 2
    error = terms[X.dtype] * unit
    return error + roundoff * (expected.abs() + error) + info.smallest_normal * info.eps


def formula(N: Tensor, X: Tensor, scale: Tensor) -> Tensor:
    return scale.double()[:, None, None] * (N.double() @ X.double())


@BODIES
@settings(deadline=None, max_examples=60)
@given(shape=shapes, X_dtype=dtypes, dtype=dtypes, seed=seeds)
def test_elements_are_within_the_bound_of_float64(
    shape: tuple[int, int, int, int],
    X_dtype: torch.dtype,
    dtype: torch.dtype,
    seed: int,
    body: Body,
) -> None:
    N, X, scale, loss = case(*shape, X_dtype, seed)
    found = body(N, X, scale, loss, dtype)
    assert found.dtype == dtype and found.is_contiguous()
    expected = formula(N, X, scale)
    exceeds = (found.double() - expected).abs() > allowed(N, X, scale, expected, dtype)
    assert not (exceeds & (expected.abs() < torch.finfo(dtype).max)).any()


@pytest.mark.parametrize("X_dtype", NARROW, ids=str)
@pytest.mark.parametrize("D", [130, 128 * PROGRAMS], ids=["small", "large"])
def test_tiles_of_the_launcher_cover_rows_of_several_tiles(X_dtype: torch.dtype, D: int) -> None:
    N, X, scale, loss = case(1, 2 if D > 130 else 70, 70, D, X_dtype)
    found = apply_rows_triton(N, X, scale, loss, torch.float32)
    expected = formula(N, X, scale)
    assert ((found - expected).abs() <= allowed(N, X, scale, expected, torch.float32)).all()


@BODIES
@settings(deadline=None, max_examples=20)
@given(shape=shapes, wide=st.booleans(), dtype=dtypes, seed=seeds)
def test_without_X_coefficients_are_scaled(
    shape: tuple[int, int, int, int], wide: bool, dtype: torch.dtype, seed: int, body: Body
) -> None:
    N, _, scale, loss = case(*shape, torch.float32, seed)
    N = N.double() if wide else N
    found = body(N, None, scale.to(N.dtype), loss.to(N.dtype), dtype)
    expected = scale.double()[:, None, None] * N.double()
    info = torch.finfo(dtype)
    error = (2 * U + info.eps) * expected.abs() + info.smallest_normal * info.eps
    assert found.dtype == dtype and ((found.double() - expected).abs() <= error).all()


@BODIES
@pytest.mark.parametrize("X_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_coefficients_may_exceed_the_range_of_float16(
    size: float, X_dtype: torch.dtype, body: Body
) -> None:
    N, X, scale, loss = case(1, 5, 17, 20, X_dtype)
    N = N * size
    expected = formula(N, X, scale)
    error = (body(N, X, scale, loss, torch.float32) - expected).abs()
    assert (error <= allowed(N, X, scale, expected, torch.float32)).all()


@BODIES
def test_float64_coefficients_and_rows(body: Body) -> None:
    """As the eigh engine gives them: N float64, X and p in 16 bits; or all of them float64."""
    N, X, scale, loss = case(2, 5, 17, 20, torch.bfloat16)
    wide = (N.double(), X, scale.double(), loss.double())
    expected = formula(N, X, scale)
    found = body(*wide, torch.float32)
    assert ((found - expected).abs() <= allowed(N, X, scale, expected, torch.float32)).all()
    torch.testing.assert_close(body(*wide, torch.float64), expected, atol=0, rtol=1e-13)
    N, X, scale, loss = case(2, 5, 17, 20, torch.float32)
    found = apply_rows_triton(N, X.double(), scale, loss, torch.float32)
    expected = formula(N, X, scale)
    assert ((found - expected).abs() <= allowed(N, X, scale, expected, torch.float32)).all()


@BODIES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("with_X", [True, False], ids=["X", "identity"])
def test_a_view_whose_loss_is_not_finite_gets_zeros_whatever_it_holds(
    with_X: bool, bad: float, body: Body
) -> None:
    N, X, scale, loss = case(3, 5, 17, 20, torch.bfloat16)
    X_or_none = X if with_X else None
    good = body(N, X_or_none, scale, loss, torch.float32)
    N[1, 2, 3] = X[1, 4, 5] = scale[1] = float("nan")
    loss[1] = bad
    found = body(N, X_or_none, scale, loss, torch.float32)
    assert (found[1] == 0).all()
    assert torch.equal(found[[0, 2]], good[[0, 2]])


def test_strided_inputs_are_read_as_they_look() -> None:
    N, X, scale, loss = case(2, 5, 17, 20, torch.bfloat16)
    expected = kernel(N, X, scale, loss, torch.bfloat16)
    spread = torch.stack([N, -N], dim=-1)[..., 0]
    strided = (spread, X.mT.contiguous().mT, torch.stack([scale, -scale], 1)[:, 0])
    assert torch.equal(kernel(*strided, loss, torch.bfloat16), expected)
    everywhere = kernel(N, X, scale[:1].expand(2), loss[1:].expand(2), torch.bfloat16)
    assert torch.equal(everywhere[0], expected[0])
    without = kernel(spread, None, strided[2], loss, torch.float32)
    assert torch.equal(without, kernel(N, None, scale, loss, torch.float32))


@pytest.mark.parametrize("with_X", [True, False], ids=["X", "identity"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_op_is_registered_correctly(dtype: torch.dtype, with_X: bool) -> None:
    N, X, scale, loss = case(2, 5, 17, 20, torch.float16)
    torch.library.opcheck(apply_rows, (N, X if with_X else None, scale, loss, dtype))


def test_every_block_of_the_launcher_is_listed() -> None:
    pointers = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    listed = {
        (v.types["X_ptr"], *list(v.constants.values())[1:], v.num_warps, v.num_stages)
        for v in variants()
        if v.name == "_apply_kernel"
    }
    for dtype, pointer in pointers.items():
        for v, b, D in ((1, 1, 1), (2, 256, 256), (2, 256, 2048), (2, 512, 2048), (2, 4096, 8192)):
            assert (pointer, *blocks(dtype, v, b, D)) in listed
