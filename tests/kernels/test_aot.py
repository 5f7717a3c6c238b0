"""`python -m rdm_kernels.aot`: what it compiles, and that it refuses what must not be shipped."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rdm_kernels import aot
from rdm_kernels.gram import blocks
from rdm_kernels.tiles import LARGE

ROOT = Path(__file__).parents[2]


def python(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """In a process of its own: what this one imported is interpreted, and does not compile."""
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    return python("-m", "rdm_kernels.aot", "--jobs", "1", *arguments, interpret=interpret)


def test_a_kernel_compiles_for_three_architectures_without_a_gpu() -> None:
    done = run("--kernel", "totals_kernel")
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines() if line.startswith("_totals")]
    assert [row[1] for row in table] == ["80", "90", "100"]
    assert all(int(row[2]) > 0 for row in table), "registers as ptxas reports them"
    assert "3 compiled, 0 at fault" in done.stdout


def test_interpreted_kernels_are_refused() -> None:
    done = run("--kernel", "totals", interpret=True)
    assert done.returncode == 1 and "TRITON_INTERPRET is set" in done.stderr


def test_a_name_that_fits_no_kernel_is_refused() -> None:
    done = run("--kernel", "no_such")
    assert done.returncode == 1 and "no_such" in done.stderr


# ---- what must not be shipped: kernels of at_fault.py, each truly so ---------------------------

FAULTS = [
    r"__main__\._forgotten_kernel: in no variants\(\)",
    r"_scale_kernel sm_(90|100) .*BLOCK=8192 .*: spills [1-9]\d* bytes",
    r"_scale_kernel sm_(90|100) .*BLOCK=1000 .*: does not compile",
    r"_product_kernel sm_90 .*BLOCK_K=512 .*: \d{6} bytes of shared memory, over 232448",
    r"_product_kernel sm_(90|100) .*PRECISION=ieee .*: no tensor-core instruction",
    r"_three_sums_kernel sm_100 .*: 768 columns of tensor memory, over 512",
]


@pytest.fixture(scope="module")
def at_fault() -> subprocess.CompletedProcess[str]:
    return python("tests/kernels/at_fault.py", "--cc", "90", "100", "--jobs", "1")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_must_not_be_shipped_fails(
    at_fault: subprocess.CompletedProcess[str], fault: str
) -> None:
    assert at_fault.returncode == 1, at_fault.stdout + at_fault.stderr
    assert re.search(rf"^error: {fault}", at_fault.stderr, re.MULTILINE), at_fault.stderr


def test_what_may_be_shipped_is_not_at_fault(at_fault: subprocess.CompletedProcess[str]) -> None:
    errors = [line for line in at_fault.stderr.splitlines() if line.startswith("error: ")]
    assert not [e for e in errors if "BLOCK=1024 " in e or "BLOCK_K=64 " in e]
    table = [line.split() for line in at_fault.stdout.splitlines() if line.startswith("_product")]
    instructions = {(row[1], row[5]) for row in table if "BLOCK_K=64" in row}
    assert instructions == {("90", "wgmma.mma_async"), ("100", "tcgen05.mma")}


# ---- that nothing else is launched ---------------------------------------------------------------


def test_sizes_are_told_apart_as_tritons_launcher_does() -> None:
    """Of two that it may look at, the second as its type says, and two that it may not."""
    done = python("tests/kernels/launched_sizes.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["i32: 9", "i32:16: 3", "i32:16,other: 6", "i32:1: 3"]


def test_every_block_of_the_launchers_is_listed() -> None:
    """Over many sizes, what gram's launcher would choose; variants() knows the threshold only."""
    listed = {
        (v.types["X_ptr"], v.constants["BLOCK"], v.constants["BLOCK_K"], v.num_warps, v.num_stages)
        for v in aot.listed()
        if v.name == "_product_kernel"
    }
    pointers = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    for dtype, pointer in pointers.items():
        for center in (False, True):
            for precision in ("tf32x3", "ieee"):
                for n in (1, 63, 64, 512, LARGE - 1, LARGE, LARGE + 1, 8192):
                    assert (pointer, *blocks(dtype, center, precision, n)) in listed
