"""rdm_kernels.sym_matmul against float64: its definition and its kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels import sym_matmul
from rdm_kernels.sym_matmul import sym_matmul_op, sym_matmul_triton
from rdm_kernels.tiles import Symmetric
from tests.kernels.common import Body, bodies, check_totals, randn, roundoff

BODIES = bodies(sym_matmul_op, sym_matmul_triton)
numbers = st.sampled_from([0.0, 1.0, -1.875, 0.375, 3.4445])
sizes = st.sampled_from([1, 2, 15, 16, 17, 33])


def symmetric(v: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    A = randn(v, n, n, seed=seed, dtype=dtype) / n**0.5
    return A.tril() + A.tril(-1).mT


def square(A: Tensor) -> Tensor:
    """A^2, symmetric bit for bit; commutes with A up to rounding."""
    B = (A.double() @ A.double()).to(A.dtype)
    return B.tril() + B.tril(-1).mT


def check(
    found: Symmetric, A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float,
    gamma: float,
) -> None:  # fmt: skip
    """The lower triangle against float64, within the bound that sym_matmul.py states; totals."""
    assert found.matrix.dtype == found.norm.dtype == A.dtype
    u, A, B = roundoff(A), A.double(), B.double()
    C = A.new_zeros(()) if C is None else C.double()
    identity = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    S = alpha * A @ B.mT + beta * C + gamma * identity
    unit = abs(alpha) * A.norm(dim=2)[:, :, None] * B.norm(dim=2)[:, None, :]
    added = unit + abs(beta) * C.abs() + abs(gamma) * identity
    allowed = (A.shape[2] + 14) * u * unit + 3 * u * added
    assert ((found.matrix - S).abs().tril() <= allowed).all()
    check_totals(found)


@BODIES
@settings(max_examples=25)
@given(
    v=st.integers(1, 2), n=sizes, k=sizes, alpha=numbers, beta=numbers, gamma=numbers,
    scale=st.sampled_from([1e-6, 1.0, 1e6]), seed=st.integers(0, 2**31),
    which=st.sampled_from(["rows", "commuting", "same"]), third=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_elements_and_totals_are_within_their_bounds(
    v: int, n: int, k: int, alpha: float, beta: float, gamma: float, scale: float, seed: int,
    which: str, third: bool, dtype: torch.dtype, body: Body,
) -> None:  # fmt: skip
    """In float32, and in float64 for float64."""
    A = randn(v, n, k, seed=seed, dtype=dtype) if which == "rows" else symmetric(v, n, seed, dtype)
    A = A * scale
    B = {"rows": -2 * A, "commuting": square(A) if which == "commuting" else A, "same": A}[which]
    C = symmetric(v, n, seed + 1, dtype) if third else None
    arguments = (A, B, C, alpha, beta * scale, gamma)
    check(Symmetric(*body(*arguments)), *arguments)


def test_the_launchers_own_blocks_cover_several_tiles() -> None:
    A = symmetric(2, 140)  # 140 terms: the launcher splits the sum
    check(Symmetric(*sym_matmul_triton(A, A, A, 1.0, -0.5, 0.25)), A, A, A, 1.0, -0.5, 0.25)


def test_b_and_c_default_to_a() -> None:
    A = symmetric(2, 20)
    plain = sym_matmul(A, beta=0.5, gamma=2.0)
    for same in (sym_matmul(A, A, beta=0.5, gamma=2.0), sym_matmul(A, C=A, beta=0.5, gamma=2.0)):
        assert all(map(torch.equal, plain, same))


@BODIES
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_flags_its_matrix_only(value: float, body: Body) -> None:
    A = symmetric(2, 20)
    A[1, 18, 3] = A[1, 3, 18] = value
    found = Symmetric(*body(A, A, None, 1.0, 0.0, 0.0))
    assert found.nonfinite.tolist() == [0, 1]
    assert found.matrix[0].isfinite().all() and not found.norm[1].isfinite()
