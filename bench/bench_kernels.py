"""Is each op worth it? It races PyTorch's own, eager and compiled, and other kernels.

Every result is compared with float64 before it is timed. Inputs are converted to the dtype and
layout of an implementation before the clock starts, unless the op converts them too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import chosen
from bench.exact import views
from rdm_kernels import filtered_cosine, gram, neg_cosine, safe_eigh, sym_matmul
from rdm_kernels.product import product

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NARROW = torch.bfloat16 if GPU else torch.float32  # what autocast hands to the loss

# (global batch, projection width), as in bench_spectral_loss.py, and sides n of square matrices,
# the most important first.
SMALL = ["32x64", "64x32"]
SHAPES = ["512x2048", "256x2048", "1024x2048", "2048x2048", "4096x2048"] if GPU else ["256x2048"]
SIDES = ["512", "256", "1024", "2048"] if GPU else ["256"]

COMPILED = ["compiled"] if GPU else []  # on a CPU the compiler takes a minute
MATMUL = ["rdm", "torch_fp32", "torch_tf32"] if GPU else ["rdm", "torch_fp32"]
IMPLEMENTATIONS = {
    # cublas_fp32 multiplies in 16 bits and returns float32; torch_fp32 widens first
    "bench_gram": ["rdm", "torch_fp32"]
    + (["cublas_fp32"] if GPU else [])
    + (["quack"] if GPU and find_spec("quack") else []),
    "bench_sym_matmul": MATMUL,
    "bench_product": MATMUL,
    "bench_safe_eigh": ["rdm", "torch_fp32", "torch_fp64"],
    "bench_neg_cosine": ["rdm", "eager", *COMPILED],
    "bench_filtered_cosine": ["rdm", "eager", *COMPILED],
}

Measure = Callable[..., None]
U = 2.0**-24


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    bench = metafunc.function.__name__
    if bench in ("bench_sym_matmul", "bench_product", "bench_safe_eigh"):
        cases = chosen(metafunc.config, ["32"], SIDES)
    else:
        cases = chosen(metafunc.config, SMALL, SHAPES)
    wide = [case for case in cases if shape_of(case)[0] <= shape_of(case)[-1]]  # B <= D
    if bench == "bench_filtered_cosine":
        cases = wide  # its bilinear forms are those of the sample side
    elif bench == "bench_gram":
        cases = [*cases, *(f"{case} stacked" for case in wide)]
    metafunc.parametrize(
        ("name", "case"), [(name, case) for case in cases for name in IMPLEMENTATIONS[bench]]
    )


def shape_of(case: str) -> tuple[int, ...]:
    """Sizes of a case such as "512x2048", "512x2048 stacked" or "512"."""
    return tuple(map(int, case.split()[0].split("x")))


def batch(B: int, D: int) -> Tensor:
    """Projections of both views, [2, B, D], without gradient."""
    return torch.stack([z.detach() for z in views(B, D, DEVICE, NARROW)])


def require_close(found: Tensor, exact: Tensor, tolerance: float) -> None:
    """Assert that the relative error in the Frobenius norm is within the tolerance."""
    error = float((found.double() - exact.double()).norm() / exact.double().norm())
    assert error <= tolerance, f"wrong by {error:.1e} of its norm, over {tolerance:.0e}"


def summed(K: int) -> float:
    """Relative error to allow in a float32 sum of K products.

    Tensor cores truncate the sum after every 8 terms of each of tf32x3's three passes: 3/8 K u in
    the mean, if the terms have one sign.
    """
    return 1e-6 + K * U


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Let PyTorch round float32 products on CUDA to tf32, or not, until the context ends."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if enabled else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def matmul(
    measure: Measure, name: str, A: Tensor, B: Tensor, ours: Callable[[], Tensor], passes: int
) -> None:
    """A B by our op or by cuBLAS; the op takes so many passes of tensor cores, of n^3 each."""
    rounds = name.endswith("tf32")
    run = ours if name == "rdm" else lambda: torch.bmm(A, B)
    with tf32(rounds):
        require_close(run(), A.double() @ B.double(), 2e-3 if rounds else summed(A.shape[-1]))
        flops = (passes // 3 if rounds else passes) * A.shape[-1] ** 3
        measure(run, bytes_moved=3 * A.numel() * 4, flops={"tf32": flops}, capturable=True)


# ---- symmetric products ------------------------------------------------------------------------


def bench_gram(measure: Measure, name: str, case: str) -> None:
    """The smaller Gram matrix of each view, or one of the stacked rows of both views."""
    B, D = shape_of(case)
    X = batch(B, D)
    stacked, samples = "stacked" in case, B <= D
    rows = X.flatten(0, 1)[None] if stacked else X
    rows = rows if samples else rows.mT
    wide, dense = rows.float(), rows.contiguous()
    n, K = rows.shape[1:]
    side = "samples" if samples else "features"
    out = torch.empty(len(rows), n, n, device=DEVICE)

    def run() -> Tensor:
        match name:
            case "rdm":
                return gram(X, side=side, stacked=stacked)
            case "torch_fp32":
                return torch.bmm(wide, wide.mT)
            case "cublas_fp32":
                return torch.bmm(rows, rows.mT, out_dtype=torch.float32)
            case _:
                from quack.gemm_interface import gemm_symmetric

                gemm_symmetric(dense, dense.mT, out=out)
                return out

    with tf32(False):
        require_close(run(), rows.double() @ rows.double().mT, summed(K))
        unit = "bf16" if GPU else "fp32"
        measure(
            run,
            bytes_moved=X.numel() * X.element_size() + len(rows) * n * n * 4,
            flops={unit: len(rows) * n * n * K},
            capturable=True,
        )


def squares(n: int) -> tuple[Tensor, Tensor]:
    """Two symmetric matrices that commute, for each view, [2, n, n] float32."""
    G = gram(batch(n, 2 * n), side="samples")
    A = G / torch.linalg.matrix_norm(G, keepdim=True)
    return A, A @ A


def bench_sym_matmul(measure: Measure, name: str, case: str) -> None:
    """A B of symmetric matrices that commute, half of it mirrored."""
    A, B = squares(*shape_of(case))
    matmul(measure, name, A, B, lambda: sym_matmul(A, B).matrix, passes=6)


def bench_product(measure: Measure, name: str, case: str) -> None:
    """A B of any matrices."""
    A, B = torch.randn(2, 2, *shape_of(case) * 2, device=DEVICE)
    matmul(measure, name, A, B, lambda: product(A, B), passes=12)


# ---- decompositions ------------------------------------------------------------------------------


def bench_safe_eigh(measure: Measure, name: str, case: str) -> None:
    """Both views' Gram matrices. The floor is that of a reduction to tridiagonal form."""
    n = shape_of(case)[0]
    A = squares(n)[0]
    wide = A.double()

    def run() -> tuple[Tensor, Tensor]:
        if name == "rdm":
            found = safe_eigh(A)
            return found.eigenvalues, found.vectors
        return torch.linalg.eigh(wide if name == "torch_fp64" else A)

    eigenvalues, V = run()
    require_close((V * eigenvalues[:, None]) @ V.mT, wide, 1e-4)
    unit = "fp32" if name == "torch_fp32" else "fp64"
    measure(run, bytes_moved=2 * A.numel() * 4, flops={unit: 2 * 4 / 3 * n**3})


def eager_cosine(p: Tensor, z: Tensor) -> Tensor:
    wide = torch.promote_types(p.dtype, torch.float32)
    return -F.cosine_similarity(p.to(wide), z.to(wide), dim=-1).mean(dim=-1)


def bench_neg_cosine(measure: Measure, name: str, case: str) -> None:
    """Forward and backward of both views."""
    p, z = batch(*shape_of(case)), batch(*shape_of(case)).flip(0)
    p.requires_grad_()
    torch._dynamo.reset()
    loss = {"rdm": neg_cosine, "eager": eager_cosine}.get(name) or torch.compile(eager_cosine)

    def run() -> Tensor:
        return torch.autograd.grad(loss(p, z).sum(), p)[0]

    exact = eager_cosine(p.double(), z.double()).sum()
    require_close(run(), torch.autograd.grad(exact, p)[0], 5e-3)
    measure(run, bytes_moved=5 * p.numel() * p.element_size(), capturable=True)


def filtered_eager(p: Tensor, z: Tensor, X: Tensor, h: Tensor) -> Tensor:
    """The loss as a PyTorch user would write it: y = p W = (p X^T) h X, without W."""
    y = (p.to(X.dtype) @ X.mT) @ h @ X
    return -F.cosine_similarity(y, z.to(X.dtype), dim=-1).mean(dim=-1)


def bench_filtered_cosine(measure: Measure, name: str, case: str) -> None:
    """Forward and backward of both views from h, M = G h and inner products, on the sample side.

    rdm uses the bilinear forms; the others form filtered rows.
    """
    X = batch(*shape_of(case))
    z = X.flip(0)
    p, wide = X.clone().requires_grad_(), X.float()
    _, B, D = X.shape
    torch._dynamo.reset()
    eager = torch.compile(filtered_eager) if name == "compiled" else filtered_eager
    with tf32(False):
        G = gram(X, side="samples")
        h = G / torch.linalg.matrix_norm(G, keepdim=True)  # the filter s^4, up to a factor
        M = G @ h
        MG, inner, norm = M @ G, z.float() @ wide.mT, z.float().norm(dim=-1)

        def run() -> Tensor:
            if name == "rdm":
                loss = filtered_cosine(p, norm, M, MG, inner, h, X)
            else:
                loss = eager(p, z, wide, h)
            return torch.autograd.grad(loss.sum(), p)[0]

        exact = filtered_eager(p, z, X.double(), h.double()).sum()
        require_close(run(), torch.autograd.grad(exact, p)[0], 5e-3)
        measure(
            run,
            bytes_moved=2 * (2 * B * D * X.element_size() + 4 * B * B * 4),
            # N from h as three products of tf32, N X as two of 16 bits
            flops={"tf32": 2 * 3 * 2 * B**3, "bf16": 2 * 2 * 2 * B * B * D},
            capturable=True,
        )
