"""Compile every kernel, in every variant that may be launched, without a GPU.

    python -m rdm_kernels.aot [--cc 80 90 100] [--kernel NAME ...] [--jobs N]

Prints a row for each: registers a thread and bytes spilled, as ptxas reports them to Triton, shared
memory, and the tensor-core instruction in its PTX. Exits with 1 if a kernel does not compile,
spills, asks for more shared or tensor memory than a block may have, lacks tensor-core instructions
that it was written for, or is listed by no file's `variants()`.

Each variant is compiled as Triton's launcher would, once for all that it tells apart of a size
(rdm_kernels/variant.py, SIZES). Whatever Triton is imported compiles; `make aot` runs this with the
installed one and with the oldest that pyproject.toml allows.
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

# Shared memory that one block may have, in bytes: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY = 512  # columns, on sm_100: PTX ISA, "Tensor Memory"
TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)")


@dataclass(frozen=True)
class Row:
    """What came of one compilation."""

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


def launched(module: ModuleType) -> set[str]:
    """Names of the kernels that a file defines; device functions do not end in _kernel."""
    return {
        name
        for name, value in vars(module).items()
        if name.endswith("_kernel")
        and isinstance(value, triton.JITFunction)
        and value.fn.__module__ == module.__name__
    }


def unlisted() -> list[str]:
    """Kernels that no `variants()` names, so that nothing here would check them."""
    names = {variant.name for variant in listed()}
    return [
        f"{module.__name__}.{name}"
        for module in modules()
        for name in sorted(launched(module) - names)
    ]


def listed() -> list[Variant]:
    """All that the launchers of all files may ask for."""
    return [v for module in modules() if hasattr(module, "variants") for v in module.variants()]


@cache
def every_variant() -> list[Variant]:
    """The same as Triton tells them apart, each once."""
    found = [each for variant in listed() for each in specialised(variant)]
    return list({(v.name, v.label, *v.types.items()): v for v in found}.values())


def specialised(variant: Variant) -> Iterator[Variant]:
    """The variant, each of its sizes one of SIZES, in every combination that it allows.

    A launcher looks at the value of every integer that the kernel does not exclude.
    """
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
    """One of those as Triton's compiler takes it."""
    signature, constants, attributes = {}, dict(variant.constants), {}
    for index, parameter in enumerate(variant.kernel.params):
        kind, _, size = variant.types.get(parameter.name, "constexpr").partition(":")
        if size == "1":
            kind, constants[parameter.name] = "constexpr", 1
        if size == "16" or kind[0] == "*":
            attributes[(index,)] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    return ASTSource(variant.kernel, signature, constants, attributes)


def assembled(variant: Variant, cc: int) -> tuple[CompiledKernel, str]:
    """The compiled kernel, and what ptxas had to say of it."""
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    report = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(report):
        knobs.compilation.always_compile = True  # a cached kernel comes without a report
        knobs.nvidia.dump_ptxas_log = True
        target = GPUTarget("cuda", cc, 32)
        kernel = triton.compile(source(variant), target=target, options=options)
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
    except Exception as error:  # the table goes on, and the run fails
        return Row(variant.name, variant.label, cc, error=f"does not compile: {error}"[:500])


def _numbers(pattern: str, report: str) -> list[int]:
    """One of each function that was not inlined."""
    found = re.findall(pattern, report)
    if not found:
        raise ValueError(f"ptxas did not report {pattern!r}: {report}")
    return [int(number) for number in found]


def fault(row: Row, tensor_cores: bool) -> str:
    """Why this must not be shipped, or nothing."""
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
    """Compile all, each process at its own; in order."""
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
    if knobs.runtime.interpret:
        sys.exit("error: TRITON_INTERPRET is set, and interpreted kernels do not compile: unset it")

    variants = every_variant()
    wanted = [
        number
        for number, variant in enumerate(variants)
        if not args.kernel or any(part in variant.name for part in args.kernel)
    ]
    tasks = [(number, cc) for number in wanted for cc in args.cc]
    if not tasks:
        sys.exit(f"error: no kernel's name contains {' or '.join(args.kernel)}")

    faults = [f"{name}: in no variants(), so not checked" for name in unlisted()]
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
