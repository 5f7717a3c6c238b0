"""What do the filter's parts cost: the library's routines, and our products by block size?"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bench.bench_kernels import DEVICE, GPU, batch, require_close, squares, summed
from bench.conftest import is_small
from rdm_kernels import gram
from rdm_kernels.gram import gram_op, gram_triton
from rdm_kernels.product import product_op, product_triton
from rdm_kernels.sym_matmul import sym_matmul_op, sym_matmul_triton
from rdm_kernels.tiles import Blocks

Measure = Callable[..., None]

SIDES = (512, 1024, 256, 2048)
ROUTINES = [
    "potrf",
    "potrs",
    "trsm",
    "fp32 gemm",
    "fp64 gemm",
    "fp64 potrf",
    "fp32 eigh",
    "fp64 eigh",
]
OPS = {"sym_matmul": sym_matmul_op, "product": product_op, "gram": gram_op}
LAUNCHERS = {"sym_matmul": sym_matmul_triton, "product": product_triton, "gram": gram_triton}
WARPS = [(64, 32, 4, 3), (64, 32, 8, 3), (64, 32, 4, 4), (64, 16, 4, 3), (64, 64, 4, 2)]
BLOCKS = [*WARPS, (128, 16, 8, 3), (128, 32, 8, 3), (128, 64, 8, 3)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    small = is_small(metafunc.config)
    if metafunc.function is bench_library:
        sides = [32] if small else SIDES
        cases = [(name, str(n)) for name in ROUTINES for n in sides]
    else:
        sides = [32] if small else [512, 1024]
        sizes = [Blocks(16, 16, 4, 2)] if small else map(Blocks._make, BLOCKS)
        cases = [("x".join(map(str, size)), f"{op} {n}")
                 for n in sides for op in OPS for size in sizes]  # fmt: skip
    metafunc.parametrize(("name", "case"), cases)


def bench_library(measure: Measure, name: str, case: str) -> None:
    """cuSOLVER's and cuBLAS's routines as PyTorch calls them, on two matrices."""
    n, dtype = int(case), torch.float64 if "fp64" in name else torch.float32
    A = gram(batch(n, 2 * n), side="samples").to(dtype)
    A = A / torch.linalg.matrix_norm(A)[:, None, None]
    A.diagonal(dim1=1, dim2=2).add_(1e-3)
    L, B = torch.linalg.cholesky_ex(A).L, torch.randn_like(A)
    run: Callable[[], object] = {
        "potrf": lambda: torch.linalg.cholesky_ex(A),
        "potrs": lambda: torch.cholesky_solve(B, L),
        "trsm": lambda: torch.linalg.solve_triangular(L, B, upper=False),
        "gemm": lambda: A @ B,
        "eigh": lambda: torch.linalg.eigh(A),
    }[name.split()[-1]]
    operations = {"potrf": 1 / 3, "potrs": 2, "trsm": 1, "gemm": 2, "eigh": 4 / 3}[name.split()[-1]]
    unit = "fp64" if dtype == torch.float64 else "fp32"
    measure(
        run,
        bytes_moved=2 * A.numel() * A.element_size(),
        flops={unit: 2 * operations * n**3},
        capturable="eigh" not in name,
    )


def bench_blocks(measure: Measure, name: str, case: str) -> None:
    """Our products in these block sizes (BLOCK x BLOCK_K x warps x stages); on a CPU, once."""
    op, side = case.split()
    n, block = int(side), Blocks(*map(int, name.split("x")))
    multiply = partial(LAUNCHERS[op], block=block) if GPU else OPS[op]
    arguments: tuple[Tensor | float | None, ...]
    if op == "gram":
        X = batch(n, 4 * n)
        exact, arguments, flops = X.double() @ X.double().mT, (X, False, False, False), 4 * n
        unit = "bf16"
    else:
        A, B = squares(n) if op == "sym_matmul" else torch.randn(2, 2, n, n, device=DEVICE)
        exact, flops, unit = A.double() @ B.double(), 3 * n, "tf32"
        arguments = (A, B, None, 1.0, 0.0, 0.0, False)[: 7 if op == "sym_matmul" else 5]

    def run() -> object:
        return multiply(*arguments)

    try:
        found = run()
    except OutOfResources as error:
        pytest.skip(str(error))
    product = found if isinstance(found, Tensor) else found[0]  # type: ignore[index]
    require_close(product, exact, summed(arguments[0].shape[-1]))  # type: ignore[union-attr]
    halved = 1 if op == "product" else 2
    measure(
        run,
        bytes_moved=exact.numel() * 4,
        flops={unit: 2 * 2 * flops * n * n / halved},
        capturable=True,
    )
