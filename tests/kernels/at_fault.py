"""Kernels that must not ship, and some that may, for tests of rdm_kernels.aot.

This script is `python -m rdm_kernels.aot` with these kernels in place of the package's.
"""

import sys

import triton
import triton.language as tl

from rdm_kernels import aot, tiles
from rdm_kernels.variant import Variant


@triton.jit
def _scale_kernel(X_ptr, Y_ptr, BLOCK: tl.constexpr):
    """Every value is needed twice, before and after the sum, so one warp holds all of them."""
    x = tl.load(X_ptr + tl.arange(0, BLOCK))
    tl.store(Y_ptr + tl.arange(0, BLOCK), x / tl.sum(x))


@triton.jit
def _product_kernel(
    X_ptr, Y_ptr, Z_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Tiles of BLOCK_K wait in shared memory, one for each stage."""
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(X_ptr + rows * K + k[None, :])
        y = tl.load(Y_ptr + k[:, None] * BLOCK + cols)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(Z_ptr + rows * BLOCK + cols, total)


@triton.jit
def _three_sums_kernel(X_ptr, Y_ptr, Z_ptr, K):
    """On sm_100 each sum takes 256 columns of tensor memory."""
    rows, cols, k = tl.arange(0, 128)[:, None], tl.arange(0, 256)[None, :], tl.arange(0, 64)
    a = tl.zeros((128, 256), tl.float32)
    b = tl.zeros((128, 256), tl.float32)
    c = tl.zeros((128, 256), tl.float32)
    for start in range(0, K, 64):
        x = tl.load(X_ptr + rows * K + start + k[None, :])
        y = tl.load(Y_ptr + (start + k[:, None]) * 256 + cols)
        a = tl.dot(x, y, a)
        b = tl.dot(x, y + 1, b)
        c = tl.dot(x, y + 2, c)
    tl.store(Z_ptr + rows * 256 + cols, a * b * c)


@triton.jit
def _forgotten_kernel(X_ptr):
    tl.store(X_ptr, 0.0)


def scale(BLOCK: int) -> Variant:
    launch = {"BLOCK": BLOCK, "num_warps": 1}
    return Variant(_scale_kernel, {"X_ptr": "*fp32", "Y_ptr": "*fp32"}, launch)


def product(X: str, BLOCK_K: int, PRECISION: str) -> Variant:
    types = {"X_ptr": X, "Y_ptr": X, "Z_ptr": "*fp32", "K": "i32:16"}
    constants = {"BLOCK": 64, "BLOCK_K": BLOCK_K, "PRECISION": PRECISION}
    return Variant(_product_kernel, types, constants, tensor_cores=True)


def variants() -> list[Variant]:
    types = {"X_ptr": "*fp16", "Y_ptr": "*fp16", "Z_ptr": "*fp32", "K": "i32:16"}
    return [
        scale(1024),
        scale(8192),
        scale(1000),
        product("*fp16", 64, "tf32"),
        product("*fp16", 512, "tf32"),
        product("*fp32", 16, "ieee"),
        Variant(_three_sums_kernel, types, {"num_warps": 8, "num_stages": 2}),
        *tiles.variants(),
    ]


LIMITS = {  # only the last can be kept
    "_no_kernel": {},
    "_product_kernel BLOCK_K=64": {
        90: aot.Limit(aot.Step(1, 99, 0), 1),
        100: aot.Limit(aot.Step(99, 99, 99), 1),
    },
    "_three_sums_kernel": dict.fromkeys((90, 100), aot.Limit(aot.Step(99, 99, 0), 1)),
}

if __name__ == "__main__":
    aot.LIMITS = LIMITS
    aot.modules = lambda: [sys.modules["__main__"]]
    sys.exit(aot.main())
