"""rdm_kernels.gram against float64, for its definition and for its kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels import gram
from rdm_kernels.gram import DTYPES, dot_precision, gram_op, gram_triton, launch
from rdm_kernels.tiles import WIDTH, Blocks, Symmetric, padded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
U = 2.0**-24  # unit roundoff of float32
SMALL = Blocks(16, 16, 4, 2)  # several tiles even of matrices that are quick to interpret


@dataclass(frozen=True)
class Options:
    features: bool
    center: bool = False
    stacked: bool = False

    @property
    def op(self) -> tuple[bool, bool, bool, str]:
        return self.features, self.center, self.stacked, "tf32x3"


def kernel(X: Tensor, *options: Any, parts: int = 1) -> tuple[Tensor, ...]:
    return launch(X, *options, SMALL, parts)


def in_parts(X: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return kernel(X, *options, parts=3)


BODIES = pytest.mark.parametrize(
    "body", [gram_op, kernel, in_parts], ids=["definition", "kernel", "split"]
)
Body = Callable[..., tuple[Tensor, ...]]

# Around block edges and the padding of columns, with B < D, B = D, B > D and single rows.
sizes = st.sampled_from([1, 2, 15, 16, 17, 33, 50])
shapes = st.tuples(st.integers(1, 2), sizes, sizes)
dtypes = st.sampled_from(DTYPES)
options = st.sampled_from(
    [
        Options(features, center, stacked)
        for features in (False, True)
        for center in (False, True)
        for stacked in (False, True)
        if not (features and stacked)
    ]
)
scales = st.sampled_from([1e-4, 1.0, 1e4])
seeds = st.integers(0, 2**31)


def batch(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows with a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(shape, generator=generator) + torch.randn(shape[-1], generator=generator)
    return X.to(DEVICE, dtype)


def exact(X: Tensor, how: Options) -> tuple[Tensor, Tensor]:
    """The Gram matrix in float64, and the unit of an element's error that gram.py states."""
    wide = X.double()
    lines = wide.abs() + wide.abs().mean(dim=1, keepdim=True) if how.center else wide
    lines = lines.flatten(0, 1)[None] if how.stacked else lines
    wide = wide - wide.mean(dim=1, keepdim=True) if how.center else wide
    wide = wide.flatten(0, 1)[None] if how.stacked else wide
    wide, lines = (wide.mT, lines.mT) if how.features else (wide, lines)
    length = lines.norm(dim=-1)
    return wide @ wide.mT, length[:, :, None] * length[:, None, :]


def bound(X: Tensor, how: Options) -> float:
    """The bound that gram.py states. The interpreter's products are exact; a GPU's may be three."""
    _, B, D = X.shape
    terms = B if how.features else D
    split = 12 if dot_precision(X.dtype, how.center, "tf32x3") == "tf32x3" else 0
    return (terms + 2 + split + (B / 16 + 16 if how.center else 0)) * U


@BODIES
@settings(deadline=None, max_examples=20)
@given(shape=shapes, dtype=dtypes, how=options, scale=scales, seed=seeds)
def test_elements_are_within_the_bound_of_float64_and_symmetric_bit_for_bit(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    how: Options,
    scale: float,
    seed: int,
    body: Body,
) -> None:
    scale = min(scale, 1.0) if dtype == torch.float16 else scale  # 1e4 leaves float16's range
    X = (batch(shape, torch.float32, seed) * scale).to(dtype)
    found = Symmetric(*body(X, *how.op))
    G, unit = exact(X, how)
    assert found.matrix.dtype == torch.float32 and found.matrix.shape == G.shape
    assert torch.equal(found.matrix, found.matrix.mT)
    assert ((found.matrix - G).abs() <= bound(X, how) * unit).all()


@BODIES
@settings(deadline=None, max_examples=15)
@given(shape=shapes, how=options, seed=seeds)
def test_what_comes_with_a_matrix_is_of_that_matrix(
    shape: tuple[int, int, int], how: Options, seed: int, body: Body
) -> None:
    found = Symmetric(*body(batch(shape, seed=seed), *how.op))
    G = found.matrix.double()
    assert torch.equal(found.diagonal, found.matrix.diagonal(dim1=1, dim2=2))
    n = G.shape[1]
    trace = G.diagonal(dim1=1, dim2=2).sum(dim=1)
    assert ((found.trace - trace).abs() <= n * U * trace).all()
    norm = torch.linalg.matrix_norm(G)
    assert ((found.norm - norm).abs() <= (n + 8) * U * norm).all()
    assert found.nonfinite.dtype == torch.int32 and not found.nonfinite.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [False, True], ids=["samples", "features"])
def test_no_less_accurate_than_float32_matmul(dtype: torch.dtype, features: bool) -> None:
    X = batch((2, 40, 200) if not features else (2, 200, 40), dtype)
    how = Options(features)
    G, unit = exact(X, how)
    wide = X.float()
    product = wide.mT @ wide if features else wide @ wide.mT
    floor = ((product - G) / unit).square().mean().sqrt()
    for body in (gram_op, gram_triton, in_parts):
        error = ((body(X, *how.op)[0] - G) / unit).square().mean().sqrt()
        assert error <= 2 * floor  # twice: another order of sums


def test_block_sizes_of_the_launcher_cover_a_matrix_of_several_tiles() -> None:
    for how in (Options(False), Options(True), Options(False, stacked=True)):
        X = batch((2, 70, 90), torch.bfloat16)
        found, (G, unit) = Symmetric(*gram_triton(X, *how.op)), exact(X, how)
        assert ((found.matrix - G).abs() <= bound(X, how) * unit).all()
        assert torch.equal(found.matrix, found.matrix.mT)


def test_a_long_sum_is_split_and_no_term_is_lost() -> None:
    """K = 1030 is 17 steps of 64, so the launcher itself splits, with a last part that is short."""
    X = batch((1, 3, 1030), torch.float16)
    how = Options(False)
    G, unit = exact(X, how)
    assert ((gram_triton(X, *how.op)[0] - G).abs() <= bound(X, how) * unit).all()


def test_stacked_views_give_the_blocks_of_each_and_of_both() -> None:
    X = batch((2, 5, 7))
    K = gram(X, side="samples", stacked=True, center=True).matrix[0].double()
    x, y = X.double() - X.double().mean(dim=1, keepdim=True)
    expected = torch.cat([torch.cat([x @ x.mT, x @ y.mT], 1), torch.cat([y @ x.mT, y @ y.mT], 1)])
    torch.testing.assert_close(K, expected, atol=1e-5, rtol=0)


@BODIES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [(0, 0), (16, 30), (19, 32)])
@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
def test_one_value_that_is_not_finite_flags_its_view_only(
    value: float, at: tuple[int, int], center: bool, body: Body
) -> None:
    X = batch((2, 20, 33))
    X[1, at[0], at[1]] = value
    for features in (False, True):
        found = Symmetric(*body(X, *Options(features, center).op))
        assert found.nonfinite.tolist() == [0, 1]
        assert found.matrix[0].isfinite().all() and found.norm[0].isfinite()
        assert not found.diagonal[1].isfinite().all() and not found.norm[1].isfinite()


@BODIES
@pytest.mark.parametrize("scale", [1e-17, 1e-12, 1e12, 1e17])
def test_the_norm_neither_overflows_nor_vanishes(scale: float, body: Body) -> None:
    X = batch((2, 20, 33)) * scale
    found = Symmetric(*body(X, *Options(False).op))
    norm = torch.linalg.matrix_norm(found.matrix.double())
    torch.testing.assert_close(found.norm.double(), norm, rtol=30 * U, atol=0)
    assert not found.nonfinite.any()


@BODIES
def test_what_overflows_is_flagged_and_zeros_are_not(body: Body) -> None:
    assert Symmetric(*body(batch((1, 4, 4)) * 1e25, *Options(False).op)).nonfinite.item() == 1
    zeros = Symmetric(*body(torch.zeros(1, 4, 4, device=DEVICE), *Options(False).op))
    assert zeros.nonfinite.item() == 0
    assert not any(field.any() for field in zeros)


@BODIES
def test_centering_of_a_mean_far_from_zero(body: Body) -> None:
    X = batch((2, 40, 24)) + 1000
    for how in (Options(False, True), Options(True, True), Options(False, True, True)):
        G, unit = exact(X, how)
        assert ((body(X, *how.op)[0] - G).abs() <= bound(X, how) * unit).all()


@BODIES
def test_strided_and_misaligned_inputs_are_read_as_they_look(body: Body) -> None:
    wide = batch((2, 24, 40))
    flat = batch((1, 1, 2 * 16 * 16 + 1)).flatten()
    for X in (
        wide.mT,
        batch((2, 32, 20)).mT,
        wide[:, ::2],
        wide[:, :, 3:17],
        flat[1:].view(2, 16, 16),
    ):
        for features in (False, True):
            found = body(X, *Options(features).op)
            expected = body(X.clone(memory_format=torch.contiguous_format), *Options(features).op)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_kernels_get_what_they_were_compiled_for() -> None:
    """`aot` compiles for aligned rows only; others would run, but unchecked."""
    X = batch((1, 1, 1 + 2 * 16)).flatten()
    for odd in (X[1:].view(1, 2, 16), X[:30].view(1, 2, 15), X[:32].view(1, 16, 2).mT):
        found = padded(odd)
        assert found.is_contiguous() and found.data_ptr() % 16 == 0
        assert found.shape[2] % WIDTH == 0 and not found[:, :, odd.shape[2] :].any()
        assert torch.equal(found[:, :, : odd.shape[2]], odd)


def test_autocast_does_not_lower_the_precision() -> None:
    X = batch((1, 8, 64))
    plain = gram(X, side="samples").matrix
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(gram(X, side="samples").matrix, plain)


def test_no_gradient_is_taken() -> None:
    X = batch((1, 4, 4)).requires_grad_()
    assert not gram(X, side="samples").matrix.requires_grad


def test_op_is_registered_correctly() -> None:
    for how in (Options(False), Options(True, center=True), Options(False, stacked=True)):
        torch.library.opcheck(gram_op, (batch((2, 5, 9)), *how.op))


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        (torch.zeros(4, 8), {"side": "samples"}, r"\[v, B, D\].*got torch.float32 \(4, 8\)"),
        (torch.zeros(1, 4, 8).double(), {"side": "samples"}, "float64"),
        (torch.zeros(1, 0, 8), {"side": "samples"}, "non-empty"),
        (torch.zeros(1, 4, 8), {"side": "rows"}, "side='rows'"),
        (torch.zeros(1, 4, 8), {"side": "samples", "precision": "tf32"}, "precision='tf32'"),
        (torch.zeros(1, 4, 8), {"side": "features", "stacked": True}, "stacks rows"),
    ],
    ids=["2d", "dtype", "empty", "side", "precision", "stacked"],
)
def test_what_does_not_fit_is_named(X: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gram(X, **options)
