"""`python -m rdm_kernels.aot`: what it compiles, and that it refuses what must not be shipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rdm_kernels import aot
from rdm_kernels.gram import blocks
from rdm_kernels.tiles import LARGE

ROOT = Path(__file__).parents[2]


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """In a process of its own: what this one imported is interpreted, and does not compile."""
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-W", "ignore", "-m", "rdm_kernels.aot", "--jobs", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


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


PROBE = """
import sys
from dataclasses import replace
import rdm_kernels.{module} as module
from rdm_kernels import aot
{change}
sys.argv = ["aot", "--cc", "90", "--kernel", "{kernel}", "--jobs", "1"]
sys.exit(aot.main())
"""


@pytest.mark.parametrize(
    ("module", "kernel", "change", "message"),
    [
        ("tiles", "totals", "module.variants = lambda: []", "_totals_kernel: in no variants()"),
        (
            "tiles",
            "totals",
            "v = module.variants()[0]; module.variants = lambda: [replace(v, tensor_cores=True)]",
            "no tensor-core instruction",
        ),
        ("tiles", "totals", "aot.SHARED[90] = 8", "of shared memory, over 8"),
        (
            "tiles",
            "totals",
            "v = module.variants()[0]; module.variants = "
            "lambda: [replace(v, constants={'BLOCK': 500})]",
            "does not compile",
        ),
    ],
    ids=["unlisted", "tensor-cores", "shared", "broken"],
)
def test_what_must_not_be_shipped_fails(
    module: str, kernel: str, change: str, message: str
) -> None:
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    probe = PROBE.format(module=module, kernel=kernel, change=change)
    if message.startswith("_totals"):
        probe = probe.replace('"totals"', '"mean"')  # something must be left to compile
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", probe],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stderr


def test_a_spill_is_a_fault() -> None:
    assert aot.fault(aot.Row("kernel", "variant", 90, spilled=8), False) == "spills 8 bytes"
    assert aot.fault(aot.Row("kernel", "variant", 90), False) == ""


def test_every_block_of_the_launchers_is_listed() -> None:
    """Over many sizes, what gram's launcher would choose; variants() knows the threshold only."""
    listed = {
        (v.types["X_ptr"], v.constants["BLOCK"], v.constants["BLOCK_K"], v.num_warps, v.num_stages)
        for v in aot.every_variant()
        if v.name == "_product_kernel"
    }
    pointers = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    for dtype, pointer in pointers.items():
        for centre in (False, True):
            for precision in ("tf32x3", "ieee"):
                for n in (1, 63, 64, 512, LARGE - 1, LARGE, LARGE + 1, 8192):
                    assert (pointer, *blocks(dtype, centre, precision, n)) in listed
