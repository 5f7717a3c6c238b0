"""One compilation of a kernel, as a launcher asks for it and `rdm_kernels.aot` checks it."""

from dataclasses import dataclass
from typing import Any

# Triton specializes a kernel on each integer argument that is not in its do_not_specialize:
# multiples of 16, the number 1 (which becomes a constant), and all other numbers.
SIZES = ("16", "other", "1")
OPTIONS = {"num_warps": 4, "num_stages": 3}  # and their defaults in Triton

FP32 = "*fp32"
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": FP32}


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its run-time arguments and the keywords of its launch.

    Each kernel file lists all variants that its launchers may ask for in `variants()`, made from
    the block sizes that the launchers read.
    """

    kernel: Any  # a triton.jit function; an interpreted one cannot be compiled
    types: dict[str, str]
    """Of run-time arguments: "*fp32" (16-byte aligned, as PyTorch allocates), "fp32", "i32" (any
    number), or "i32:" and the SIZES that occur, separated by commas: "i32:16", "i32:16,other"."""
    launch: dict[str, Any]
    """Values of constexpr arguments, and those of OPTIONS that are not defaults."""
    tensor_cores: bool = False  # `aot` fails if the compiled kernel uses none

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def constants(self) -> dict[str, Any]:
        return {name: value for name, value in self.launch.items() if name not in OPTIONS}

    @property
    def options(self) -> dict[str, int]:
        return {name: self.launch.get(name, default) for name, default in OPTIONS.items()}

    @property
    def label(self) -> str:
        """Text that distinguishes it from the kernel's other variants."""
        types = sorted({t[1:] for t in self.types.values() if t[0] == "*"} - {"fp32", "i32"})
        values = [f"{name}={value}" for name, value in self.constants.items()]
        sizes = [f"{name}:{t.split(':')[1]}" for name, t in self.types.items() if ":" in t]
        warps = f"warps={self.options['num_warps']}"
        return " ".join([*(types or ["fp32"]), *values, *sizes, warps])
