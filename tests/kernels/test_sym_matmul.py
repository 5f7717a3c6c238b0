"""rdm_kernels.sym_matmul against float64: its definition and its kernels."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels import sym_matmul
from rdm_kernels.sym_matmul import sym_matmul_op, sym_matmul_triton
from tests.kernels.common import SMALL, Body, Launches, bodies, randn, roundoff

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
    found: tuple[Tensor, Tensor], A: Tensor, B: Tensor, C: Tensor | None, alpha: float,
    beta: float, gamma: float, norm: bool,
) -> None:  # fmt: skip
    """The lower triangle against float64, within the bound that sym_matmul.py states; the norm."""
    matrix, norms = found
    assert matrix.dtype == norms.dtype == A.dtype
    assert torch.equal(matrix, matrix.mT)
    u, A, B = roundoff(A), A.double(), B.double()
    C = A.new_zeros(()) if C is None else C.double()
    identity = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    S = alpha * A @ B.mT + beta * C + gamma * identity
    unit = abs(alpha) * A.norm(dim=2)[:, :, None] * B.norm(dim=2)[:, None, :]
    added = unit + abs(beta) * C.abs() + abs(gamma) * identity
    allowed = (A.shape[2] + 14) * u * unit + 3 * u * added
    assert ((matrix - S).abs().tril() <= allowed).all()
    exact = torch.linalg.matrix_norm(matrix.double())[: len(norms)]
    assert len(norms) == norm * len(A)
    assert ((norms - exact).abs() <= (A.shape[1] + 10) * u * exact).all()


@BODIES
@settings(max_examples=25)
@given(
    v=st.integers(1, 2), n=sizes, k=sizes, alpha=numbers, beta=numbers, gamma=numbers,
    scale=st.sampled_from([1e-6, 1.0, 1e6]), seed=st.integers(0, 2**31),
    which=st.sampled_from(["rows", "commuting", "same"]), third=st.booleans(),
    norm=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_elements_and_norms_are_within_their_bounds(
    v: int, n: int, k: int, alpha: float, beta: float, gamma: float, scale: float, seed: int,
    which: str, third: bool, norm: bool, dtype: torch.dtype, body: Body,
) -> None:  # fmt: skip
    """In float32, and in float64 for float64."""
    A = randn(v, n, k, seed=seed, dtype=dtype) if which == "rows" else symmetric(v, n, seed, dtype)
    A = A * scale
    B = {"rows": -2 * A, "commuting": square(A) if which == "commuting" else A, "same": A}[which]
    C = symmetric(v, n, seed + 1, dtype) if third else None
    arguments = (A, B, C, alpha, beta * scale, gamma, norm)
    check(body(*arguments), *arguments)


def test_the_launchers_own_blocks_cover_several_tiles() -> None:
    arguments = (symmetric(2, 140),) * 3 + (1.0, -0.5, 0.25, True)
    check(sym_matmul_triton(*arguments), *arguments)


def test_b_and_c_default_to_a() -> None:
    A = symmetric(2, 20)
    plain = sym_matmul(A, beta=0.5, gamma=2.0).matrix
    for same in (sym_matmul(A, A, beta=0.5, gamma=2.0), sym_matmul(A, C=A, beta=0.5, gamma=2.0)):
        assert torch.equal(plain, same.matrix) and not len(same.norm)


@BODIES
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_stays_in_its_matrix(value: float, body: Body) -> None:
    A = symmetric(2, 20)
    A[1, 18, 3] = A[1, 3, 18] = value
    matrix, norm = body(A, A, None, 1.0, 0.0, 0.0, True)
    assert norm.isfinite().tolist() == [True, False] and matrix[0].isfinite().all()


@BODIES
@pytest.mark.parametrize("scale", [1e-17, 1e17])
def test_the_norm_neither_overflows_nor_vanishes(scale: float, body: Body) -> None:
    arguments = (randn(2, 34, 17) * scale,) * 2 + (None, 1.0, 0.0, 0.0, True)
    check(body(*arguments), *arguments)


def launched(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> list[tuple[str, Any]]:
    """Names and arguments of the kernels that the launcher asks for."""
    launches = Launches()
    with monkeypatch.context() as patch:
        launches.record(patch)
        sym_matmul_triton(*args, **options)
    return [(kernel.__name__, arguments) for kernel, arguments in launches]


@pytest.mark.parametrize("n", [40, 256, 1024])
def test_a_square_product_is_one_launch_and_its_norm_another(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = torch.ones(2, n, n)
    for C, gamma in ((None, 0.0), (A, 1.0)):
        arguments = (A, A, C, 1.0, 2.0, gamma)
        assert len(launched(monkeypatch, *arguments, False)) == 1
        names = [name for name, _ in launched(monkeypatch, *arguments, True)]
        assert names == ["_symmetric_kernel", "_norm_kernel"]


def test_only_a_long_sum_of_few_tiles_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch adds the parts."""
    A = randn(1, 40, 1100)
    ((_, arguments),) = launched(monkeypatch, A, A, None, 1.0, 0.0, 0.0, False)
    assert arguments["out_ptr"].shape[1] == 2
    for C, gamma, norm in ((A[:, :, :40], 0.0, False), (None, 1.0, False), (None, 0.0, True)):
        kernel = launched(monkeypatch, A, A, C, 1.0, 1.0, gamma, norm, block=SMALL, parts=3)[0]
        assert kernel[1]["out_ptr"].shape[1] == 1
    arguments = (A, A, None, 1.0, 0.0, 0.0, False)
    check(sym_matmul_triton(*arguments), *arguments)
