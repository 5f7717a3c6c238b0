"""What of hardware and libraries is here, and the line that installs what is not."""

import importlib
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from rdm_fast.data.loaders.dali_loader import import_graph, install_line
from rdm_fast.errors import Unavailable

EXTRAS = {  # extra of this distribution: library that it brings
    "plot": "matplotlib",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "trackio": "trackio",
    "umap": "umap-learn",
    "wandb": "wandb",
}
CPU_FEATURES = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_bf16": "AMX bf16"}
FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # the last is what ARM calls it
APEX_LINE = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation "
    "git+https://github.com/NVIDIA/apex"
)
CUDA_TORCH_LINE = "pip install --force-reinstall --no-cache-dir torch torchvision"


@dataclass(frozen=True)
class Finding:
    """One thing that a run may use."""

    name: str
    found: str
    """What is here; "none" where it is not."""
    install: str = ""
    """The line that installs it, or what else to do; empty if there is nothing to do."""


def look_at_machine() -> list[Finding]:
    """Hardware first, then libraries, then optional extras. Raises nothing."""
    return [
        Finding("cpu", cpu()),
        *gpus(),
        torch_finding(),
        library("torchvision"),
        library("triton", "pip install 'triton>=3.6'" if platform.system() == "Linux" else ""),
        nccl(),
        dali(),
        apex(),
        *(library(module, f"pip install 'rdm-fast[{x}]'") for x, module in EXTRAS.items()),
    ]


# ---- hardware --------------------------------------------------------------------------------


def usable_cpus() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction sets, as Linux names them; none elsewhere."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    found = [line for line in lines if line.startswith(("flags", "Features"))]
    return set(found[0].partition(":")[2].split()) if found else set()


def has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 by instructions of its own."""
    return bool(cpu_flags() & {*FAST_BF16})


def cpu() -> str:
    flags = cpu_flags()
    known = [name for flag, name in CPU_FEATURES.items() if flag in flags]
    parts = [
        _cpu_model(),
        f"{usable_cpus()} of {os.cpu_count()} cores usable, torch uses {torch.get_num_threads()}",
        f"{_memory_gib():.0f} GiB",
        ", ".join(known),
    ]
    return "; ".join(part for part in parts if part)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def gpus() -> list[Finding]:
    """Every GPU that torch can use, and the driver; what to do if torch cannot use those there."""
    driver = nvidia_smi("driver_version")
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        memory, major, minor = about.total_memory / 2**30, about.major, about.minor
        text = f"{about.name}, {memory:.0f} GiB, compute capability {major}.{minor}"
        found.append(Finding(f"gpu {index}", text))
    advice = ""
    if driver and not found:
        advice = CUDA_TORCH_LINE if torch.version.cuda is None else _driver_advice(driver[0])
    if not found:
        names = ", ".join(nvidia_smi("name"))
        found = [Finding("gpu", f"{names}, which torch cannot use" if names else "none", advice)]
    return [*found, Finding("driver", driver[0] if driver else "none")]


def _driver_advice(driver: str) -> str:
    return (
        f"driver {driver} may be too old for torch's CUDA {torch.version.cuda}, or "
        "CUDA_VISIBLE_DEVICES hides the GPU: update the driver, or unset the variable"
    )


def nvidia_smi(field: str) -> list[str]:
    """A property of every GPU that the driver knows; empty without a driver."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


# ---- libraries -------------------------------------------------------------------------------


def version(distributions: Iterable[str]) -> str | None:
    """Of the first of these distributions that is installed, with its name if it is another."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def library(name: str, install: str = "") -> Finding:
    found = version([name])
    return Finding(name, found or "none", "" if found else install)


def torch_finding() -> Finding:
    cuda = torch.version.cuda
    cudnn = torch.backends.cudnn.version() if cuda else None
    text = f"{torch.__version__}, " + (f"CUDA {cuda}, cuDNN {cudnn}" if cuda else "for CPUs only")
    return Finding("torch", text)


def nccl() -> Finding:
    if not dist.is_nccl_available():
        return Finding("nccl", "none", "" if torch.version.cuda is None else CUDA_TORCH_LINE)
    return Finding("nccl", ".".join(map(str, torch.cuda.nccl.version())))


def dali() -> Finding:
    found = version(["nvidia-dali-cuda130", "nvidia-dali-cuda120"])
    if found is None:
        return Finding("DALI", "none", install_line())
    try:
        import_graph()
    except Unavailable as error:
        return Finding("DALI", f"{found}, which cannot be loaded", str(error))
    return Finding("DALI", found)


Apex = Literal["nvidia", "nvidia without CUDA extensions", "another project", "none"]


def apex_here() -> Apex:
    """Which package is importable as `apex`, found without running any of its code.

    PyPI's `apex` is a toolkit for web applications; NVIDIA's is installed from its repository and
    has `apex.optimizers`, whose fused steps need the extension `amp_C`.
    """
    importlib.invalidate_caches()
    spec = find_spec("apex")
    if spec is None:
        return "none"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_sgd.py").is_file() for folder in folders):
        return "another project"
    return "nvidia" if find_spec("amp_C") else "nvidia without CUDA extensions"


def apex() -> Finding:
    """NVIDIA apex; there is nothing to install where there is no GPU."""
    line = APEX_LINE if torch.cuda.is_available() else ""
    match apex_here():
        case "nvidia":
            return Finding("NVIDIA apex", version(["apex"]) or "found")
        case "nvidia without CUDA extensions":
            return Finding("NVIDIA apex", "built without its CUDA extensions", line)
        case "another project":
            found = "none; the `apex` installed here is another project of that name, from PyPI"
            return Finding("NVIDIA apex", found, "pip uninstall apex" + (line and f"; {line}"))
        case "none":
            return Finding("NVIDIA apex", "none" if line else "none (for GPUs)", line)
