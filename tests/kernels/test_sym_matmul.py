"""rdm_kernels.sym_matmul against float64, for its definition and for its kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels import sym_matmul
from rdm_kernels.sym_matmul import launch, sym_matmul_op, sym_matmul_triton
from rdm_kernels.tiles import Blocks, Symmetric

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
U = 2.0**-24  # unit roundoff of float32
SMALL = Blocks(16, 16, 4, 2)  # several tiles even of matrices that are quick to interpret


def kernel(*args: Any) -> tuple[Tensor, ...]:
    return launch(*args, SMALL, 1)


def in_parts(*args: Any) -> tuple[Tensor, ...]:
    return launch(*args, SMALL, 2)


BODIES = pytest.mark.parametrize(
    "body", [sym_matmul_op, kernel, in_parts], ids=["definition", "kernel", "split"]
)
Body = Callable[..., tuple[Tensor, ...]]

shapes = st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 15, 16, 17, 33, 50]))
numbers = st.sampled_from([0.0, 1.0, -1.875, 0.375, 3.4445])
scales = st.sampled_from([1e-6, 1.0, 1e6])
seeds = st.integers(0, 2**31)


def symmetric(v: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(v, n, n, generator=generator) / n**0.5
    return (A.tril() + A.tril(-1).mT).to(DEVICE)


def formula(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """In float64, and the error that sym_matmul.py allows each element."""
    A, B = A.double(), B.double()
    C = A.new_zeros(()) if C is None else C.double()
    identity = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    S = alpha * A @ B.mT + beta * C + gamma * identity
    lengths = A.norm(dim=2)[:, :, None] * B.norm(dim=2)[:, None, :]
    added = abs(alpha) * lengths + abs(beta) * C.abs() + abs(gamma) * identity
    return S, (A.shape[2] + 2 + 12) * U * abs(alpha) * lengths + 3 * U * added


@BODIES
@settings(deadline=None, max_examples=25)
@given(
    shape=shapes, alpha=numbers, beta=numbers, gamma=numbers, scale=scales, seed=seeds,
    commuting=st.booleans(), third=st.booleans(),
)  # fmt: skip
def test_elements_are_within_the_bound_of_float64_and_symmetric_bit_for_bit(
    shape: tuple[int, int],
    alpha: float,
    beta: float,
    gamma: float,
    scale: float,
    seed: int,
    commuting: bool,
    third: bool,
    body: Body,
) -> None:
    A = symmetric(*shape, seed=seed) * scale
    B = symmetric_square(A) if commuting else A
    C = symmetric(*shape, seed=seed + 1) if third else None
    arguments = (A, B, C, alpha, beta * scale, gamma)
    found = Symmetric(*body(*arguments, "tf32x3"))
    S, allowed = formula(*arguments)
    assert torch.equal(found.matrix, found.matrix.mT)
    # B commutes with A up to its own rounding, which the lower triangle's formula does not see
    assert ((found.matrix - S).abs().tril() <= allowed).all()


@BODIES
@pytest.mark.parametrize(("n", "k"), [(1, 33), (17, 40), (40, 17), (33, 1)])
def test_rows_of_any_number_of_terms(n: int, k: int, body: Body) -> None:
    A = torch.randn(2, n, k, device=DEVICE)
    C = symmetric(2, n)
    for B in (A, 2 * A):
        found = Symmetric(*body(A, B, C, 0.5, -3.0, 1.0, "tf32x3"))
        S, allowed = formula(A, B, C, 0.5, -3.0, 1.0)
        assert found.matrix.shape == (2, n, n) and torch.equal(found.matrix, found.matrix.mT)
        assert ((found.matrix - S).abs() <= allowed).all()


def test_what_is_left_out_is_a() -> None:
    A = symmetric(2, 20)
    plain = sym_matmul(A, beta=0.5, gamma=2.0)
    for given_ in (
        sym_matmul(A, A, C=A, beta=0.5, gamma=2.0),
        sym_matmul(A, A, beta=0.5, gamma=2.0),
    ):
        assert all(torch.equal(a, b) for a, b in zip(plain, given_, strict=True))


def test_float64_is_computed_in_float64() -> None:
    A = symmetric(2, 30).double()
    found = sym_matmul(A, beta=0.5, gamma=-1.0)
    S, _ = formula(A, A, A, 1.0, 0.5, -1.0)
    assert all(x.dtype == torch.float64 for x in found[:4]) and found.nonfinite.dtype == torch.int32
    torch.testing.assert_close(found.matrix, S, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.norm, torch.linalg.matrix_norm(S), rtol=1e-14, atol=0)


def symmetric_square(A: Tensor) -> Tensor:
    """A^2, which commutes with A, exactly symmetric."""
    B = (A.double() @ A.double()).float()
    return B.tril() + B.tril(-1).mT


@BODIES
def test_what_comes_with_a_matrix_is_of_that_matrix(body: Body) -> None:
    A = symmetric(2, 50)
    found = Symmetric(*body(A, A, A, -1.5, 0.5, 2.0, "tf32x3"))
    S = found.matrix.double()
    assert torch.equal(found.diagonal, found.matrix.diagonal(dim1=1, dim2=2))
    diagonal = S.diagonal(dim1=1, dim2=2)
    error = (found.trace - diagonal.sum(dim=1)).abs()
    assert (error <= 50 * U * diagonal.abs().sum(dim=1)).all()
    torch.testing.assert_close(
        found.norm.double(), torch.linalg.matrix_norm(S), rtol=60 * U, atol=0
    )
    assert not found.nonfinite.any()


def test_block_sizes_of_the_launcher_cover_a_matrix_of_several_tiles() -> None:
    A = symmetric(2, 140)  # 140 terms: the launcher splits the sum
    found = Symmetric(*sym_matmul_triton(A, A, A, 1.0, -0.5, 0.25, "tf32x3"))
    S, allowed = formula(A, A, A, 1.0, -0.5, 0.25)
    assert ((found.matrix - S).abs() <= allowed).all()
    assert torch.equal(found.matrix, found.matrix.mT)


def test_a_chain_of_products_is_the_polynomial() -> None:
    """Newton-Schulz 1.5 X - 0.5 X^3 on a symmetric matrix, once."""
    A = symmetric(1, 24)
    square = sym_matmul(A).matrix
    cubic = sym_matmul(A, square, alpha=-0.5, beta=1.5).matrix.double()
    wide = A.double()
    torch.testing.assert_close(cubic, 1.5 * wide - 0.5 * wide @ wide @ wide, atol=2e-6, rtol=0)


@BODIES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_flags_its_matrix_only(value: float, body: Body) -> None:
    A = symmetric(2, 20)
    A[1, 18, 3] = A[1, 3, 18] = value
    found = Symmetric(*body(A, A, None, 1.0, 0.0, 0.0, "tf32x3"))
    assert found.nonfinite.tolist() == [0, 1]
    assert found.matrix[0].isfinite().all() and not found.norm[1].isfinite()


def test_strided_inputs_are_read_as_they_look() -> None:
    A = symmetric(2, 40)[:, ::2, ::2]
    for body in (kernel, in_parts):
        found = body(A, A, A, 1.0, 2.0, 3.0, "tf32")
        whole = A.contiguous()
        expected = body(whole, whole, whole, 1.0, 2.0, 3.0, "tf32")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_does_not_lower_the_precision() -> None:
    A = symmetric(1, 64)
    plain = sym_matmul(A).matrix
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(sym_matmul(A).matrix, plain)


def test_op_is_registered_correctly() -> None:
    A = symmetric(2, 5)
    torch.library.opcheck(sym_matmul_op, (A, A.clone(), A.clone(), 1.0, 2.0, 3.0, "tf32"))
    torch.library.opcheck(sym_matmul_op, (A, A.clone(), None, 1.0, 0.0, 3.0, "tf32"))


@pytest.mark.parametrize(
    ("A", "options", "message"),
    [
        (torch.zeros(4, 4), {}, r"got A torch.float32 \(4, 4\)"),
        (torch.zeros(1, 4, 5), {"beta": 1.0}, r"\(1, 4, 5\)"),
        (torch.zeros(1, 4, 4).half(), {}, "float16"),
        (torch.zeros(1, 4, 4), {"C": torch.zeros(1, 4, 4).double()}, "float64"),
        (torch.zeros(1, 4, 4), {"B": torch.zeros(1, 5, 5)}, r"B torch.float32 \(1, 5, 5\)"),
        (torch.zeros(1, 4, 4), {"precision": "fast"}, "'fast'"),
    ],
    ids=["2d", "oblong", "dtype", "dtypes", "B", "precision"],
)
def test_what_does_not_fit_is_named(A: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sym_matmul(A, **options)
