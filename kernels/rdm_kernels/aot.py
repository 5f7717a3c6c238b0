"""Compile every kernel, in every variant that may be launched, without a GPU.

    python -m rdm_kernels.aot [--cc 80 90 100] [--kernel NAME ...] [--jobs N] [--common]

Prints a row per compilation: registers per thread and bytes spilled, as ptxas reports them, shared
memory, blocks per multiprocessor, and the tensor-core instruction in the PTX. The machine code of
the main kernels is read too, for what a step of their loop costs. Exits with 1 if a kernel does not
compile, spills, needs more shared or tensor memory than a block may have, lacks tensor-core
instructions that it was written for, is worse than its LIMITS, or is missing from every file's
`variants()`.

Each variant is compiled as Triton's launcher would, once for each kind of size that Triton
specializes on (rdm_kernels/variant.py, SIZES), or with --common for the first alone. `make aot`
runs this with the installed Triton and with the oldest that pyproject.toml allows.
"""

import argparse
import importlib
import io
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

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
# A multiprocessor's; CUDA keeps 1 KB of shared memory for each block.
REGISTERS, THREADS, RESERVED = 65536, 2048, 1024
TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)")


class Step(NamedTuple):
    """What a step of a kernel's main loop costs, in machine instructions."""

    products: int  # of the tensor cores
    barriers: int
    loads: int  # of 16 bytes, to shared memory


class Limit(NamedTuple):
    """The most products and barriers, and the fewest loads and blocks per multiprocessor."""

    step: Step
    blocks: int


FULL = {80: Limit(Step(96, 2, 8), 2), 90: Limit(Step(12, 2, 8), 3), 100: Limit(Step(12, 12, 8), 3)}
TWO = {80: Limit(Step(96, 2, 4), 2), 90: Limit(Step(12, 2, 4), 2), 100: Limit(Step(12, 12, 4), 2)}
HALF = {80: Limit(Step(16, 2, 2), 4), 90: Limit(Step(2, 2, 4), 4), 100: Limit(Step(2, 3, 4), 4)}
LIMITS = {
    "_symmetric_kernel fp32 FEATURES=False CENTER=False norms_ptr=None": FULL,
    "_symmetric_kernel fp32 FEATURES=False CENTER=False": TWO,
    "_symmetric_kernel bf16 CENTER=False BLOCK=64": HALF,
    "_symmetric_kernel fp16 CENTER=False BLOCK=64": HALF,
    "_general_product_kernel X_COLUMNS=False Y_COLUMNS=False": FULL,
    "_general_product_kernel": TWO,
}
"""Of the main kernels, by words of a row, the first that fits: the worse of both Tritons."""


def limit_of(row: str) -> str:
    """The key of the first limit whose words are all in this text, or an empty string."""
    words = set(row.split())
    return next((key for key in LIMITS if words.issuperset(key.split())), "")


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
    blocks: int = 0  # that registers and shared memory allow per multiprocessor
    step: Step | None = None  # of the main kernels
    error: str = ""

    @property
    def limit(self) -> Limit | None:
        key = limit_of(f"{self.kernel} {self.variant}")
        return LIMITS[key][self.cc] if key else None


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
        registers = max(_numbers(r"Used (\d+) registers", report))
        row = Row(
            variant.name,
            variant.label,
            cc,
            registers=registers,
            spilled=sum(_numbers(r"(\d+) bytes spill", report)),
            shared=kernel.metadata.shared,
            tensor_memory=kernel.metadata.tmem_size or 0,
            instruction=match[1] if match else "-",
            blocks=blocks_per_sm(registers, kernel.metadata.shared, kernel.metadata.num_warps, cc),
        )
        return replace(row, step=main_step(kernel.asm["cubin"])) if row.limit else row
    except Exception as error:  # listed as a fault; the table goes on
        return Row(variant.name, variant.label, cc, error=f"does not compile: {error}"[:500])


def _numbers(pattern: str, report: str) -> list[int]:
    """All matches; functions that are not inlined report their own numbers."""
    found = re.findall(pattern, report)
    if not found:
        raise ValueError(f"ptxas did not report {pattern!r}: {report}")
    return [int(number) for number in found]


def blocks_per_sm(registers: int, shared: int, warps: int, cc: int) -> int:
    """Blocks that a multiprocessor holds; registers are given out 8 a thread at a time."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * warps * 32)
    by_shared = (SHARED[cc] + RESERVED) // (shared + RESERVED)
    return min(by_registers, by_shared, THREADS // (warps * 32), 32)


def main_step(cubin: bytes) -> Step:
    """Counts of the loop with the most products, read by Triton's own disassembler."""
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(nvdisasm), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max((step_of(loop) for loop in loops(text)), default=Step(0, 0, 0))


def loops(assembly: str) -> Iterator[list[str]]:
    """Instructions between each label and a later branch back to it."""
    labels: dict[str, int] = {}
    found: list[str] = []
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([^;]*);", line):
            found.append(code[1])
            target = re.match(r"BRA.*?(\.L_x_\d+)", code[1])
            if target and target[1] in labels:
                yield found[labels[target[1]] :]


def step_of(loop: list[str]) -> Step:
    products = sum(bool(re.match(r"HMMA|HGMMA|UTC\w*MMA", code)) for code in loop)
    barriers = sum(code.startswith("BAR.") for code in loop)
    loads = sum(bool(re.match(r"LDGSTS\S*\.128", code)) for code in loop)
    return Step(products, barriers, loads)


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
    if (limit := row.limit) and (step := row.step):
        if step.products > limit.step.products or step.barriers > limit.step.barriers:
            return f"{step} costs more than {limit.step}"
        if step.loads < limit.step.loads or row.blocks < limit.blocks:
            return f"{step.loads} loads, {row.blocks} blocks per multiprocessor: under {limit}"
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
    parser.add_argument("--common", action="store_true", help="one kind of size a variant")
    args = parser.parse_args()
    if args.kernel and not any(part in v.name for v in listed() for part in args.kernel):
        sys.exit(f"error: no kernel's name contains {' or '.join(args.kernel)}")
    if knobs.runtime.interpret:
        sys.exit("error: TRITON_INTERPRET is set, and interpreted kernels do not compile: unset it")

    variants = every_variant()
    first: dict[tuple[str, str], int] = {}
    for number, variant in enumerate(variants):
        first.setdefault((variant.name, variant.label), number)
    tasks = [
        (number, cc)
        for number, variant in enumerate(variants)
        for cc in args.cc
        if not args.kernel or any(part in variant.name for part in args.kernel)
        if not args.common or first[variant.name, variant.label] == number
    ]
    faults = [f"{name}: missing from every variants(), so not checked" for name in unlisted()]
    unused = (
        set() if args.kernel else set(LIMITS) - {limit_of(f"{v.name} {v.label}") for v in variants}
    )
    faults += [f"{key}: a limit of no kernel" for key in sorted(unused)]
    form = "{:26} {:>4} {:>4} {:>6} {:>7} {:>6} {:>8} {:>8} {:>5}  {:16} {}"
    head = ("regs", "spills", "shared", "per SM", "products", "barriers", "loads", "tensor cores")
    print(form.format("kernel", "cc", *head, "variant"))
    for (number, _), row in zip(tasks, rows(tasks, args.jobs), strict=True):
        print(
            form.format(
                row.kernel, row.cc, row.registers, row.spilled, row.shared, row.blocks,
                *(row.step or "---"), row.instruction, row.variant,
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
