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
from rdm_fast.tools.doctor.machine import Finding, gpus, inspect_machine, usable_cpus

ROOT = Path(__file__).parents[3]


def test_every_optional_extra_that_brings_a_library_is_looked_for() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = pyproject["project"]["optional-dependencies"]
    assert {*machine.EXTRAS} == {*extras} - {"dev", "docs", "peers", "dali", "dali-cuda12"}
    for extra, module in machine.EXTRAS.items():
        assert extras[extra][0].startswith(module)


def test_libraries_have_versions_or_a_line_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    known = metadata.version

    def without_wandb(name: str) -> str:
        if name == "wandb":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", without_wandb)
    found = {finding.name: finding for finding in inspect_machine()}
    assert found["torchvision"] == Finding("torchvision", known("torchvision"))
    assert torch.__version__ in found["torch"].found
    assert found["DALI"].found.startswith(machine.version("nvidia-dali-cuda130") or "none")
    codec = machine.version("nvidia-nvimgcodec-cu13") or "none"  # DALI decodes with it
    assert found["nvImageCodec"] == Finding("nvImageCodec", codec)
    assert found["wandb"] == Finding("wandb", "none", "pip install 'rdm-fast[wandb]'")


def test_a_missing_dali_has_the_line_for_torchs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda *_: "")
    for cuda, wheel in (("12.8", "cuda120"), ("13.0", "cuda130")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert machine.dali().install == f"pip install 'nvidia-dali-{wheel}>=2.4,<3'"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["models.py"], "another project"),
        (["optimizers/fused_sgd.py"], "nvidia without CUDA extensions"),
        (["optimizers/fused_sgd.py", "../amp_C.py"], "nvidia"),
    ],
)
def test_nvidias_apex_is_recognized_without_running_it(
    files: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packages here fail when imported, as PyPI's does without its own dependencies."""
    for path in (tmp_path / "apex" / name for name in ("__init__.py", *files)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert machine.installed_apex() == expected


def test_the_advice_on_apex_fits_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("cuda", "fix"), [(None, ["pip install"]), ("13.0", ["driver 550.1", "13.0"])]
)
def test_an_unusable_gpu(cuda: str | None, fix: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"driver_version": ["550.1"], "name": ["NVIDIA H100"]}
    monkeypatch.setattr(machine, "nvidia_smi", lambda field: answers[field])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    gpu, driver = gpus()
    assert "NVIDIA H100" in gpu.found and driver == Finding("driver", "550.1")
    assert all(text in gpu.install for text in fix)


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus() == [Finding("gpu", "none"), Finding("driver", "none")]


def test_the_first_core_describes_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor: 0\nflags\t\t: fpu amx_bf16 avx2\nprocessor: 1\nflags\t: sse\n")
    assert cpu_property("flags", path) == "fpu amx_bf16 avx2"
    assert cpu_property("model name", path) == cpu_property("flags", tmp_path / "none") == ""
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
