"""rdm_kernels.gram against float64: its definition and its kernels."""

from dataclasses import astuple, dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels.gram import DTYPES, gram_op, gram_triton, is_narrow
from rdm_kernels.tiles import WIDTH, pad_rows
from tests.kernels.common import INTERPRETED, Body, U, bodies, randn

BODIES = bodies(gram_op, gram_triton)


@dataclass(frozen=True)
class How:
    features: bool = False
    center: bool = False
    stacked: bool = False


ROWS, COLUMNS = How(), How(features=True)
CENTERED = [How(center=True), How(True, True), How(center=True, stacked=True)]
ALL = [ROWS, COLUMNS, How(stacked=True), *CENTERED]

# Around block edges and the padding of columns, with B < D, B = D, B > D and single rows.
sizes = st.sampled_from([1, 2, 15, 16, 17, 33])
shapes = st.tuples(st.integers(1, 2), sizes, sizes)


def batch(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows with a mean that is not zero."""
    return (randn(*shape, seed=seed) + randn(shape[-1], seed=seed + 1)).to(dtype)


def check(found: Tensor, X: Tensor, how: How) -> None:
    """Elements against float64, within the bound that gram.py states, and symmetry bit for bit."""
    wide, lines = X.double(), X.double()
    if how.center:
        lines = wide.abs() + wide.abs().mean(dim=1, keepdim=True)
        wide = wide - wide.mean(dim=1, keepdim=True)
    if how.stacked:
        wide, lines = wide.flatten(0, 1)[None], lines.flatten(0, 1)[None]
    wide, lines = (wide.mT, lines.mT) if how.features else (wide, lines)
    length = lines.norm(dim=-1)
    terms = wide.shape[2] + 2 + (0 if is_narrow(X.dtype, how.center) else 12)
    terms += X.shape[1] / 16 + 16 if how.center else 0
    error = (found - wide @ wide.mT).abs()
    assert found.dtype == torch.float32
    assert (error <= terms * U * length[:, :, None] * length[:, None, :]).all()
    assert torch.equal(found, found.mT)


@BODIES
@settings(max_examples=20)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    how=st.sampled_from(ALL),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_elements_are_within_their_bounds(
    shape: tuple[int, int, int], dtype: torch.dtype, how: How, scale: float, seed: int, body: Body
) -> None:
    scale = min(scale, 1.0) if dtype == torch.float16 else scale  # 1e4 leaves float16's range
    X = (batch(*shape, seed=seed) * scale).to(dtype)
    check(body(X, *astuple(how)), X, how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [ROWS, COLUMNS], ids=["samples", "features"])
@pytest.mark.skipif(not INTERPRETED, reason="tensor cores truncate sums, float32 products do not")
def test_no_less_accurate_than_float32_matmul(dtype: torch.dtype, how: How) -> None:
    X = batch(2, 20, 100, dtype=dtype)
    X = X.mT if how.features else X
    rows = X.mT if how.features else X
    exact = rows.double() @ rows.double().mT
    floor = (rows.float() @ rows.float().mT - exact).square().mean()
    for body in (gram_op, gram_triton):
        error = (body(X, *astuple(how)) - exact).square().mean()
        assert error <= 4 * floor  # another order of sums


@pytest.mark.parametrize("how", [ROWS, COLUMNS, How(stacked=True)], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 90), (1, 3, 2070)], ids=["tiles", "a long sum"])
def test_the_launchers_own_blocks_lose_no_term(shape: tuple[int, int, int], how: How) -> None:
    """K = 2070 is 65 steps of 32, and the last part is short."""
    X = batch(*shape, dtype=torch.bfloat16)
    check(gram_triton(X, *astuple(how)), X, how)


@BODIES
@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize(
    ("value", "at"), [(torch.nan, (0, 0)), (torch.inf, (16, 30)), (-torch.inf, (19, 32))]
)
def test_a_value_that_is_not_finite_shows_on_the_diagonal(
    value: float, at: tuple[int, int], center: bool, body: Body
) -> None:
    X = batch(2, 20, 33)
    X[1, at[0], at[1]] = value
    for features in (False, True):
        found = body(X, features, center, False)
        assert found[0].isfinite().all() and not found[1].diagonal().isfinite().all()


@BODIES
@pytest.mark.parametrize(
    ("scale", "mean", "how"), [(1e-17, 0, ROWS), (1e17, 0, ROWS), *((1, 1e3, c) for c in CENTERED)]
)
def test_extreme_scales_and_means(scale: float, mean: float, how: How, body: Body) -> None:
    """A mean far from zero is subtracted."""
    X = batch(2, 34, 17) * scale + mean
    check(body(X, *astuple(how)), X, how)


@BODIES
def test_overflow_is_not_finite_and_zeros_are(body: Body) -> None:
    X = batch(1, 4, 4)
    assert not body(X * 1e25, *astuple(ROWS)).diagonal(dim1=1, dim2=2).isfinite().any()
    assert not body(X * 0, *astuple(ROWS)).any()


def test_padding_aligns_rows_and_fills_them_with_zeros() -> None:
    X = batch(1, 1, 1 + 2 * 16).flatten()
    for odd in (X[1:].view(1, 2, 16), X[:30].view(1, 2, 15), X[:32].view(1, 16, 2).mT):
        found = pad_rows(odd)
        assert found.is_contiguous() and found.data_ptr() % 16 == 0
        assert found.shape[2] % WIDTH == 0 and not found[:, :, odd.shape[2] :].any()
        assert torch.equal(found[:, :, : odd.shape[2]], odd)
