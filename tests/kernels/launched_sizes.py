"""What Triton's launcher makes of a kernel's arguments, against what rdm_kernels.aot compiles.

A script, for a process where nothing is interpreted; it needs no GPU.
"""

import inspect
from itertools import product

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from rdm_kernels import aot
from rdm_kernels.variant import Variant

NUMBERS = (1, 2, 15, 16, 17, 1024)


@triton.jit(do_not_specialize=["c", "d"])
def _sizes_kernel(X_ptr, a, b, c, d, scale, BLOCK: tl.constexpr):
    tl.store(X_ptr + tl.arange(0, BLOCK), scale + a + b + c + d)


def launched(b: tuple[int, ...]) -> set[tuple]:
    """Type and either value (constants) or "D" (multiples of 16), of each argument."""
    kernel, backend = _sizes_kernel, make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(inspect.signature(kernel.fn), kernel.params, backend)
    found = set()
    for sizes in product(NUMBERS, b, NUMBERS, NUMBERS):
        _, arguments, _ = bind(MockTensor(torch.float32), *sizes, 1.0, 64)
        found.add(tuple((kind, value or None) for kind, value in arguments))
    return found


def compiled(b: str) -> set[tuple]:
    types = {"X_ptr": "*fp32", "a": "i32", "b": b, "c": "i32", "d": "i32:16", "scale": "fp32"}
    found = set()
    for variant in aot.specialised(Variant(_sizes_kernel, types, {"BLOCK": 64})):
        source = aot.source(variant)
        values = {**dict.fromkeys(source.attrs, "D"), **source.constants}
        kinds = enumerate(source.signature.values())
        found.add(tuple((kind, values.get((i,))) for i, kind in kinds))
    return found


for sizes, numbers in {
    "i32": NUMBERS,
    "i32:16": (16, 1024),
    "i32:16,other": (2, 15, 16, 17, 1024),
    "i32:1": (1,),
}.items():
    assert launched(numbers) == compiled(sizes), (sizes, launched(numbers) ^ compiled(sizes))
    print(f"{sizes}: {len(compiled(sizes))}")
