"""`python -m rdm_kernels.aot`: what it compiles, and that it refuses kernels that must not ship."""

import inspect
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

from rdm_kernels import aot
from rdm_kernels.variant import Variant
from tests.spies import refused

ROOT = Path(__file__).parents[2]

FAULTS = [
    r"__main__\._forgotten_kernel: missing from every variants\(\)",
    r"_scale_kernel sm_(90|100) .*BLOCK=8192 .*: spills [1-9]\d* bytes",
    r"_scale_kernel sm_(90|100) .*BLOCK=1000 .*: does not compile",
    r"_product_kernel sm_90 .*BLOCK_K=512 .*: \d{6} bytes of shared memory, over 232448",
    r"_product_kernel sm_(90|100) .*PRECISION=ieee .*: no tensor-core instruction",
    r"_no_kernel: a limit of no kernel",
    r"_product_kernel sm_90 .*BLOCK_K=64 .*: Step.* costs more than",
    r"_product_kernel sm_100 .*BLOCK_K=64 .*: \d+ loads, \d+ blocks per multiprocessor: under",
    r"_three_sums_kernel sm_100 .*: 768 columns of tensor memory, over 512",
]


@pytest.fixture(scope="module")
def compiled() -> subprocess.CompletedProcess[str]:
    """The kernels of at_fault.py, in a process where nothing is interpreted."""
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    arguments = ["tests/kernels/at_fault.py", "--cc", "90", "100", "--jobs", "1"]
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("flags, numbers", [([], [0, 1, 2, 3]), (["--common"], [0, 2, 3])])
def test_common_is_one_kind_of_size_a_variant(
    flags: list[str], numbers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [("a", "BLOCK=1"), ("a", "BLOCK=1"), ("a", "BLOCK=2"), ("b", "BLOCK=1")]
    variants = [SimpleNamespace(name=n, label=label, tensor_cores=False) for n, label in names]
    found: list[int] = []

    def rows(tasks: list[tuple[int, int]], jobs: int) -> list[aot.Row]:
        found.extend(number for number, _ in tasks)
        return [aot.Row(*names[number], cc) for number, cc in tasks]

    patches = {"every_variant": lambda: variants, "unlisted": list, "LIMITS": {}, "rows": rows}
    for name, value in patches.items():
        monkeypatch.setattr(aot, name, value)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(sys, "argv", ["aot", "--cc", "90", *flags])
    assert aot.main() == 0
    assert found == numbers


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_fails(compiled: subprocess.CompletedProcess[str], fault: str) -> None:
    assert compiled.returncode == 1, compiled.stdout + compiled.stderr
    assert re.search(rf"^error: {fault}", compiled.stderr, re.MULTILINE), compiled.stderr


def test_a_kernel_that_may_ship_has_no_fault(compiled: subprocess.CompletedProcess[str]) -> None:
    errors = [line for line in compiled.stderr.splitlines() if line.startswith("error: ")]
    assert not [e for e in errors if "_norm" in e or "BLOCK=1024 " in e]
    table = [line.split() for line in compiled.stdout.splitlines()]
    instructions = {(row[1], row[9]) for row in table if "BLOCK_K=64" in row}
    assert instructions == {("90", "wgmma.mma_async"), ("100", "tcgen05.mma")}
    norms = [row for row in table if row[0] == "_norm_kernel"]
    assert [row[1] for row in norms] == ["90", "100"]
    assert all(int(row[2]) > 0 for row in norms), "registers as ptxas reports them"


@pytest.mark.parametrize("found", ["TRITON_INTERPRET", "no_such"])
def test_nothing_to_compile(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["aot", *(["--kernel", found] if found == "no_such" else [])])
    monkeypatch.setattr(triton.knobs.runtime, "interpret", found == "TRITON_INTERPRET")
    with refused(SystemExit, found):
        aot.main()


def _sizes_kernel(X_ptr, a, b, c, d, scale, BLOCK):
    """Only its signature matters: c and d are not specialized."""


@pytest.mark.parametrize(
    ("sizes", "numbers", "count"),
    [
        ("i32", (1, 2, 15, 16, 17, 1024), 9),
        ("i32:16", (16, 1024), 3),
        ("i32:16,other", (2, 15, 16, 17, 1024), 6),
        ("i32:1", (1,), 3),
    ],
)
def test_sizes_specialize_as_in_triton(sizes: str, numbers: tuple[int, ...], count: int) -> None:
    """Argument b is restricted to the numbers of its type."""
    _sizes_kernel.__annotations__ = {"BLOCK": "tl.constexpr"}
    kernel = JITFunction(_sizes_kernel, do_not_specialize=["c", "d"])
    signature, backend = inspect.signature(_sizes_kernel), make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(signature, kernel.params, backend)
    every = (1, 2, 15, 16, 17, 1024)
    launched = set()
    for a, b, c, d in product(every, numbers, every, every):
        _, arguments, _ = bind(MockTensor(torch.float32), a, b, c, d, 1.0, 64)
        launched.add(tuple((kind, value or None) for kind, value in arguments))

    types = {"X_ptr": "*fp32", "a": "i32", "b": sizes, "c": "i32", "d": "i32:16", "scale": "fp32"}
    listed = set()
    for variant in aot.specializations(Variant(kernel, types, {"BLOCK": 64})):
        source = aot.source(variant)
        values = {**dict.fromkeys(source.attrs, "D"), **source.constants}
        kinds = enumerate(source.signature.values())
        listed.add(tuple((kind, values.get((i,))) for i, kind in kinds))
    assert launched == listed and len(listed) == count
