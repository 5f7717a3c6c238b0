"""rdm_fast.tools.doctor.machine in staged environments: findings, and how to install the rest."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from rdm_fast.run.environment import cpu_property
from rdm_fast.tools.doctor import machine
from rdm_fast.tools.doctor.machine import (
    Finding,
    gpus,
    inspect_machine,
    installed_apex,
    usable_cpus,
)

ROOT = Path(__file__).parents[3]


def finding(name: str) -> Finding:
    return next(found for found in inspect_machine() if found.name == name)


def test_every_optional_extra_that_brings_a_library_is_looked_for() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = pyproject["project"]["optional-dependencies"]
    others = {"dev", "docs", "peers", "dali", "dali-cuda12"}
    ours = set(extras) - others
    assert {*machine.EXTRAS} == ours
    for extra, module in machine.EXTRAS.items():
        assert extras[extra][0].startswith(module)


def test_what_is_installed_has_its_version_and_nothing_to_install() -> None:
    assert finding("torchvision") == Finding("torchvision", metadata.version("torchvision"))
    assert torch.__version__ in finding("torch").found


def test_a_missing_extra_has_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = metadata.version

    def without_wandb(name: str) -> str:
        if name == "wandb":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", without_wandb)
    assert finding("wandb") == Finding("wandb", "none", "pip install 'rdm-fast[wandb]'")


def test_a_missing_dali_has_the_line_for_torchs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda *_: "")
    for cuda, wheel in (("12.8", "cuda120"), ("13.0", "cuda130")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert machine.dali().install == f"pip install 'nvidia-dali-{wheel}>=2.4,<3'"


# ---- apex ------------------------------------------------------------------------------------


def install_apex(folder: Path, *files: str) -> None:
    """A package that fails when it is imported, as PyPI's does without its own dependencies."""
    for name in ("apex/__init__.py", *files):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('imported')\n")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("apex/models.py",), "another project"),
        (("apex/optimizers/fused_sgd.py",), "nvidia without CUDA extensions"),
        (("apex/optimizers/fused_sgd.py", "amp_C.py"), "nvidia"),
    ],
)
def test_nvidias_apex_is_told_from_the_other_without_running_it(
    files: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_apex(tmp_path, *files)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed_apex() == expected


def test_the_advice_on_apex_fits_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    advice = {}
    for here in ("none", "another project", "nvidia without CUDA extensions", "nvidia"):
        monkeypatch.setattr(machine, "installed_apex", lambda here=here: here)
        advice[here] = machine.apex()
    assert "github.com/NVIDIA/apex" in advice["none"].install
    assert advice["another project"].install.startswith("pip uninstall apex; ")
    assert "another project" in advice["another project"].found
    assert advice["nvidia without CUDA extensions"].install == advice["none"].install
    assert advice["nvidia"].install == ""


# ---- hardware --------------------------------------------------------------------------------


def with_driver(monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> list[Finding]:
    """A machine whose driver knows a GPU that torch cannot use."""
    answers = {"driver_version": ["550.1"], "name": ["NVIDIA H100"]}
    monkeypatch.setattr(machine, "nvidia_smi", lambda field: answers[field])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    return gpus()


def test_a_gpu_that_torch_cannot_use_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, driver = with_driver(monkeypatch, cuda=None)
    assert "NVIDIA H100" in gpu.found and "pip install" in gpu.install
    assert driver.found == "550.1"
    old, _ = with_driver(monkeypatch, cuda="13.0")
    assert "driver 550.1" in old.install and "13.0" in old.install


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus() == [Finding("gpu", "none"), Finding("driver", "none")]


def test_the_cpu_is_described_by_the_first_core(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor: 0\nflags\t\t: fpu amx_bf16 avx2\nprocessor: 1\nflags\t: sse\n")
    assert cpu_property("flags", path) == "fpu amx_bf16 avx2"
    assert cpu_property("model name", path) == cpu_property("flags", tmp_path / "none") == ""


def test_fast_bf16_is_a_matter_of_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, fast in (("fpu avx2", False), ("fpu amx_bf16", True), ("", False)):
        monkeypatch.setattr(machine, "cpu_property", lambda name, flags=flags: flags)
        assert machine.has_fast_bf16() is fast


@pytest.mark.skipif(sys.platform != "linux", reason="affinity can be set on Linux only")
def test_cores_are_those_that_the_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [min(allowed)])
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)
