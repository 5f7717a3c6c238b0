"""One compilation of a kernel, as the launchers ask for it and `rdm_kernels.aot` checks it."""

from dataclasses import dataclass, field
from typing import Any

# What Triton tells apart of an integer argument when a kernel is launched, unless the kernel has it
# in do_not_specialize: multiples of 16, the number 1 (it becomes a constant), and other numbers.
SIZES = ("16", "other", "1")

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its run-time arguments and the values of the others.

    A kernel file lists all that its launchers may ask for in a function `variants()`, made from
    the same table of block sizes that the launchers read.
    """

    kernel: Any  # a triton.jit function; an interpreted one cannot be compiled
    types: dict[str, str]
    """Of run-time arguments: "*fp32" (16-byte aligned, as PyTorch allocates), "fp32", "i32" (any
    number), or "i32:" and those of SIZES that occur, with commas: "i32:16", "i32:16,other"."""
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = field(default=False, kw_only=True)  # it is a mistake if it has none

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def label(self) -> str:
        """What tells it from the other variants of the kernel."""
        types = sorted({t[1:] for t in self.types.values() if t[0] == "*"} - {"fp32", "i32"})
        values = [f"{name}={value}" for name, value in self.constants.items()]
        sizes = [f"{name}:{t.split(':')[1]}" for name, t in self.types.items() if ":" in t]
        return " ".join([*(types or ["fp32"]), *values, *sizes, f"warps={self.num_warps}"])
