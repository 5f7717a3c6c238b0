"""Compile every kernel, in every variant that may be launched, without a GPU.

    python -m rdm_kernels.aot [--cc 80 90 100] [--kernel NAME ...] [--jobs N]

Prints a row for each: registers a thread and bytes spilled, as ptxas reports them, shared memory,
and the tensor-core instruction in its PTX. Exits with 1 if a kernel does not compile, spills, asks
for more shared memory than a block may have, lacks tensor-core instructions that it was written
for, or is listed by no file's `variants()`.

Each variant is compiled as Triton would, for sizes that are multiples of 16 and for others
("any n"), where the kernel lets Triton tell. A size of exactly 1 only folds constants.
"""

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import sm_arch_from_capability
from triton.compiler import ASTSource

import rdm_kernels
from rdm_kernels.variant import Variant

# Shared memory that one block may have, in bytes: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
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
    instruction: str = "-"  # of the tensor cores
    error: str = ""


def modules() -> list[ModuleType]:
    """The kernel files of the package."""
    names = sorted(m.name for m in pkgutil.iter_modules(rdm_kernels.__path__) if m.name != "aot")
    return [importlib.import_module(f"rdm_kernels.{name}") for name in names]


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
    listed = {variant.name for variant in every_variant()}
    return [
        f"{module.__name__}.{name}"
        for module in modules()
        for name in sorted(launched(module) - listed)
    ]


def every_variant() -> list[Variant]:
    """All that the launchers of all files may ask for, each once."""
    found = [v for module in modules() if hasattr(module, "variants") for v in module.variants()]
    return list({(v.name, v.label, *v.types.items()): v for v in found}.values())


def source(variant: Variant, aligned: bool) -> ASTSource:
    """The variant as Triton's compiler takes it; free sizes are multiples of 16 or of nothing."""
    signature, attributes = {}, {}
    for index, parameter in enumerate(variant.kernel.params):
        kind, _, multiple = variant.types.get(parameter.name, "constexpr").partition(":")
        signature[parameter.name] = kind
        if kind[0] == "*" or multiple or (kind[0] == "i" and aligned and is_free(parameter)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(variant.kernel, signature, variant.constants, attributes)


def is_free(parameter: Any) -> bool:
    """Whether Triton looks at the value of this argument when it compiles."""
    return not parameter.do_not_specialize


def alignments(variant: Variant) -> list[bool]:
    """Both, unless the kernel has no size that may be a multiple of 16 or not."""
    free = (p for p in variant.kernel.params if variant.types.get(p.name) == "i32" and is_free(p))
    return [True, False] if any(free) else [True]


def assemble(ptx: str, cc: int) -> str:
    """What ptxas has to say of a kernel. Triton keeps the binary only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [_ptxas(cc), "-v", f"--gpu-name={sm_arch_from_capability(cc)}"]
        if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
            command += ["--regAllocOptLevel=2"]  # as Triton does
        run = subprocess.run(
            [*command, str(path), "-o", str(Path(folder) / "kernel.cubin")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return run.stderr


def _ptxas(cc: int) -> str:
    from triton.backends.nvidia import compiler

    return compiler.get_ptxas(cc).path


def compiled(task: tuple[int, bool, int]) -> Row:
    """Compile variant number `task[0]` for the compute capability `task[2]`."""
    number, aligned, cc = task
    variant = every_variant()[number]
    label = variant.label + ("" if aligned else " any n")
    options: dict[str, Any] = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    try:
        kernel = triton.compile(
            source(variant, aligned), target=GPUTarget("cuda", cc, 32), options=options
        )
        ptx, report = kernel.asm["ptx"], assemble(kernel.asm["ptx"], cc)
    except Exception as error:  # the table goes on, and the run fails
        return Row(variant.name, label, cc, error=f"does not compile: {error}"[:500])
    return Row(
        variant.name,
        label,
        cc,
        registers=_number(r"Used (\d+) registers", report),
        spilled=_number(r"(\d+) bytes spill stores", report)
        + _number(r"(\d+) bytes spill loads", report),
        shared=kernel.metadata.shared,
        instruction=match[1] if (match := TENSOR_CORES.search(ptx)) else "-",
    )


def _number(pattern: str, report: str) -> int:
    match = re.search(pattern, report)
    if match is None:
        raise ValueError(f"ptxas did not report {pattern!r}: {report}")
    return int(match[1])


def fault(row: Row, tensor_cores: bool) -> str:
    """Why this must not be shipped, or nothing."""
    if row.error:
        return row.error
    if row.spilled:
        return f"spills {row.spilled} bytes"
    if row.shared > SHARED[row.cc]:
        return f"{row.shared} bytes of shared memory, over {SHARED[row.cc]}"
    if tensor_cores and row.instruction == "-":
        return "no tensor-core instruction"
    return ""


def rows(tasks: list[tuple[int, bool, int]], jobs: int) -> Iterator[Row]:
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
    if triton.knobs.runtime.interpret:
        sys.exit("error: TRITON_INTERPRET is set, and interpreted kernels do not compile: unset it")

    variants = every_variant()
    wanted = [
        number
        for number, variant in enumerate(variants)
        if not args.kernel or any(part in variant.name for part in args.kernel)
    ]
    tasks = [
        (number, aligned, cc)
        for number in wanted
        for aligned in alignments(variants[number])
        for cc in args.cc
    ]
    if not tasks:
        sys.exit(f"error: no kernel's name contains {' or '.join(args.kernel)}")

    faults = [f"{name}: in no variants(), so not checked" for name in unlisted()]
    form = "{:26} {:>4} {:>4} {:>6} {:>7}  {:16} {}"
    print(form.format("kernel", "cc", "regs", "spills", "shared", "tensor cores", "variant"))
    for (number, _, _), row in zip(tasks, rows(tasks, args.jobs), strict=True):
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
