"""Compile every kernel, in every variant that may be launched, without a GPU.

    python -m rdm_kernels.aot [--cc 80 90 100] [--kernel NAME ...] [--jobs N]

Prints a row per compilation: registers per thread and bytes spilled, as ptxas reports them, shared
memory, and the tensor-core instruction in the PTX. Exits with 1 if a kernel does not compile,
spills, needs more shared or tensor memory than a block may have, lacks tensor-core instructions
that it was written for, or is missing from every file's `variants()`.

Each variant is compiled as Triton's launcher would, once for each kind of size that Triton
specializes on (rdm_kernels/variant.py, SIZES). `make aot` runs this with the installed Triton and
with the oldest that pyproject.toml allows.
"""

import argparse
import importlib
import io
import os
import pkgutil
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from types import ModuleType

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import rdm_kernels
from rdm_kernels.variant import SIZES, Variant

# Largest shared memory of a block, in bytes: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY = 512  # columns, on sm_100: PTX ISA, "Tensor Memory"
TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)")


@dataclass(frozen=True)
class Row:
    """Result of one compilation."""

    kernel: str
    variant: str
    cc: int
    registers: int = 0
    spilled: int = 0  # bytes, stored and loaded
    shared: int = 0  # bytes
    tensor_memory: int = 0  # columns
    instruction: str = "-"  # of the tensor cores
    error: str = ""


def modules() -> list[ModuleType]:
    """The kernel files of the package."""
    found = pkgutil.walk_packages(rdm_kernels.__path__, "rdm_kernels.")
    names = sorted(m.name for m in found if not m.ispkg and m.name != __name__)
    return [importlib.import_module(name) for name in names if not name.endswith(".aot")]


def listed() -> list[Variant]:
    """All variants that the launchers of all files may ask for."""
    return [v for module in modules() if hasattr(module, "variants") for v in module.variants()]


def unlisted() -> list[str]:
    """Kernels that no `variants()` lists. Device functions, which do not count, lack `_kernel`."""
    names = {variant.name for variant in listed()}
    return [
        f"{module.__name__}.{name}"
        for module in modules()
        for name, value in sorted(vars(module).items())
        if name.endswith("_kernel")
        and name not in names
        and isinstance(value, triton.JITFunction)
        and value.fn.__module__ == module.__name__
    ]


@cache
def every_variant() -> list[Variant]:
    """All specializations that Triton would compile, each once."""
    found = [each for variant in listed() for each in specializations(variant)]
    return list({(v.name, v.label, *v.types.items()): v for v in found}.values())


def specializations(variant: Variant) -> Iterator[Variant]:
    """The variant with each specialized integer fixed to one of SIZES, in every combination."""
    choices = []
    for parameter in variant.kernel.params:
        kind, _, sizes = variant.types.get(parameter.name, "constexpr").partition(":")
        if kind[0] == "i":
            free = sizes.split(",") if sizes else SIZES
            types = [kind] if parameter.do_not_specialize else [f"{kind}:{size}" for size in free]
            choices.append([(parameter.name, each) for each in types])
    for choice in product(*choices):
        yield replace(variant, types=variant.types | dict(choice))


def source(variant: Variant) -> ASTSource:
    """A specialization as input of Triton's compiler."""
    signature, constants, attributes = {}, variant.constants, {}
    for index, parameter in enumerate(variant.kernel.params):
        kind, _, size = variant.types.get(parameter.name, "constexpr").partition(":")
        if size == "1":
            kind, constants[parameter.name] = "constexpr", 1
        if size == "16" or kind[0] == "*":
            attributes[(index,)] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    return ASTSource(variant.kernel, signature, constants, attributes)


def assembled(variant: Variant, cc: int) -> tuple[CompiledKernel, str]:
    """The compiled kernel and the report of ptxas."""
    report = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(report):
        knobs.compilation.always_compile = True  # a cached kernel comes without a report
        knobs.nvidia.dump_ptxas_log = True
        target = GPUTarget("cuda", cc, 32)
        kernel = triton.compile(source(variant), target=target, options=variant.options)
    return kernel, report.getvalue()


def compiled(task: tuple[int, int]) -> Row:
    """Compile variant number `task[0]` for the compute capability `task[1]`."""
    number, cc = task
    variant = every_variant()[number]
    try:
        kernel, report = assembled(variant, cc)
        match = TENSOR_CORES.search(kernel.asm["ptx"])
        return Row(
            variant.name,
            variant.label,
            cc,
            registers=max(_numbers(r"Used (\d+) registers", report)),
            spilled=sum(_numbers(r"(\d+) bytes spill", report)),
            shared=kernel.metadata.shared,
            tensor_memory=kernel.metadata.tmem_size or 0,
            instruction=match[1] if match else "-",
        )
    except Exception as error:  # listed as a fault; the table goes on
        return Row(variant.name, variant.label, cc, error=f"does not compile: {error}"[:500])


def _numbers(pattern: str, report: str) -> list[int]:
    """All matches; functions that are not inlined report their own numbers."""
    found = re.findall(pattern, report)
    if not found:
        raise ValueError(f"ptxas did not report {pattern!r}: {report}")
    return [int(number) for number in found]


def fault(row: Row, tensor_cores: bool) -> str:
    """Reason not to ship this kernel, or an empty string."""
    if row.error:
        return row.error
    if row.spilled:
        return f"spills {row.spilled} bytes"
    if row.shared > SHARED[row.cc]:
        return f"{row.shared} bytes of shared memory, over {SHARED[row.cc]}"
    if row.tensor_memory > TENSOR_MEMORY:
        return f"{row.tensor_memory} columns of tensor memory, over {TENSOR_MEMORY}"
    if tensor_cores and row.instruction == "-":
        return "no tensor-core instruction"
    return ""


def rows(tasks: list[tuple[int, int]], jobs: int) -> Iterator[Row]:
    """Compile all in so many processes; rows come in the order of the tasks."""
    if jobs == 1:
        yield from map(compiled, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compiled, tasks)


def main() -> int:
    parser = argparse.ArgumentParser(prog="rdm_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--cc", type=int, nargs="+", choices=list(SHARED), default=list(SHARED))
    parser.add_argument("--kernel", nargs="+", help="only kernels whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args()
    if args.kernel and not any(part in v.name for v in listed() for part in args.kernel):
        sys.exit(f"error: no kernel's name contains {' or '.join(args.kernel)}")
    if knobs.runtime.interpret:
        sys.exit("error: TRITON_INTERPRET is set, and interpreted kernels do not compile: unset it")

    variants = every_variant()
    tasks = [
        (number, cc)
        for number, variant in enumerate(variants)
        for cc in args.cc
        if not args.kernel or any(part in variant.name for part in args.kernel)
    ]
    faults = [f"{name}: missing from every variants(), so not checked" for name in unlisted()]
    form = "{:26} {:>4} {:>4} {:>6} {:>7}  {:16} {}"
    print(form.format("kernel", "cc", "regs", "spills", "shared", "tensor cores", "variant"))
    for (number, _), row in zip(tasks, rows(tasks, args.jobs), strict=True):
        print(
            form.format(
                row.kernel, row.cc, row.registers, row.spilled, row.shared, row.instruction,
                row.variant,
            ),
            flush=True,
        )  # fmt: skip
        if why := fault(row, variants[number].tensor_cores):
            faults.append(f"{row.kernel} sm_{row.cc} {row.variant}: {why}")
    print(f"triton {triton.__version__}: {len(tasks)} compiled, {len(faults)} at fault")
    for line in faults:
        print(f"error: {line}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
