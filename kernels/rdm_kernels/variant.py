"""One compilation of a kernel, as the launchers ask for it and `rdm_kernels.aot` checks it."""

from dataclasses import dataclass, field
from typing import Any

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its run-time arguments and the values of the others.

    A kernel file lists all that its launchers may ask for in a function `variants()`, made from
    the same table of block sizes that the launchers read.
    """

    kernel: Any  # a triton.jit function; an interpreted one cannot be compiled
    types: dict[str, str]  # "*fp32" (aligned, as PyTorch allocates), "i32", "i32:16" (a multiple)
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
        return " ".join([*(types or ["fp32"]), *values, f"warps={self.num_warps}"])
