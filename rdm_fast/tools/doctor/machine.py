"""Which hardware and libraries this machine has, and how to install what is missing."""

import importlib
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from rdm_fast.data.loaders.dali_loader import import_graph, install_line
from rdm_fast.errors import Unavailable
from rdm_fast.run.environment import cpu_property

EXTRAS = {  # extra of this distribution: the library that it brings
    "hf": "datasets",
    "plot": "matplotlib",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "trackio": "trackio",
    "umap": "umap-learn",
    "wandb": "wandb",
}
CPU_FEATURES = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_bf16": "AMX bf16"}
FAST_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # bf16 is ARM's name for it
NVIMAGECODEC = ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12")  # decodes for DALI
APEX_LINE = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation "
    "git+https://github.com/NVIDIA/apex"
)
CUDA_TORCH_LINE = "pip install --force-reinstall --no-cache-dir torch torchvision"


@dataclass(frozen=True)
class Finding:
    """A piece of hardware or a library."""

    name: str
    found: str
    """What is installed; "none" if nothing is."""
    install: str = ""
    """How to install or repair it; empty if there is nothing to do."""


def inspect_machine() -> list[Finding]:
    """Hardware, then libraries, then optional extras."""
    triton = "pip install 'triton>=3.6'" if platform.system() == "Linux" else ""
    return [
        Finding("cpu", cpu()),
        *gpus(),
        torch_finding(),
        library("torchvision"),
        library("triton", triton),
        nccl(),
        dali(),
        Finding("nvImageCodec", version(*NVIMAGECODEC) or "none"),
        apex(),
        *(library(module, f"pip install 'rdm-fast[{x}]'") for x, module in EXTRAS.items()),
    ]


# ---- hardware --------------------------------------------------------------------------------


def usable_cpus() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_flags() -> set[str]:
    """Instruction sets of the CPU by Linux's names; empty on other systems."""
    return set((cpu_property("flags") or cpu_property("Features")).split())


def has_fast_bf16() -> bool:
    """Whether the CPU has bf16 multiplication."""
    return bool(cpu_flags() & FAST_BF16)


def cpu() -> str:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    flags = cpu_flags()
    parts = [
        cpu_property("model name") or platform.processor() or platform.machine(),
        f"{usable_cpus()} of {os.cpu_count()} cores usable, torch uses {torch.get_num_threads()}",
        f"{gib:.0f} GiB",
        ", ".join(name for flag, name in CPU_FEATURES.items() if flag in flags),
    ]
    return "; ".join(part for part in parts if part)


def gpus() -> list[Finding]:
    """Every GPU that torch can use, and the driver; how to make torch use the GPUs if it cannot."""
    driver = ", ".join(nvidia_smi("driver_version")[:1])
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        text = (
            f"{about.name}, {about.total_memory / 2**30:.0f} GiB, "
            f"compute capability {about.major}.{about.minor}"
        )
        found.append(Finding(f"gpu {index}", text))
    if not found and not driver:
        found = [Finding("gpu", "none")]
    elif not found:
        advice = CUDA_TORCH_LINE
        if torch.version.cuda is not None:
            advice = (
                f"driver {driver} may be too old for torch's CUDA {torch.version.cuda}, or "
                "CUDA_VISIBLE_DEVICES hides the GPU: update the driver, or unset the variable"
            )
        found = [Finding("gpu", f"{', '.join(nvidia_smi('name'))}, which torch cannot use", advice)]
    return [*found, Finding("driver", driver or "none")]


def nvidia_smi(field: str) -> list[str]:
    """A property of every GPU that the driver knows; empty without a driver."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


# ---- libraries -------------------------------------------------------------------------------


def version(*distributions: str) -> str:
    """Version of the first of these distributions that is installed; empty if none is."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def library(name: str, install: str = "") -> Finding:
    found = version(name)
    return Finding(name, found or "none", "" if found else install)


def torch_finding() -> Finding:
    cuda = torch.version.cuda
    build = f"CUDA {cuda}, cuDNN {torch.backends.cudnn.version()}" if cuda else "for CPUs only"
    return Finding("torch", f"{torch.__version__}, {build}")


def nccl() -> Finding:
    if not dist.is_nccl_available():
        return Finding("nccl", "none", "" if torch.version.cuda is None else CUDA_TORCH_LINE)
    return Finding("nccl", ".".join(map(str, torch.cuda.nccl.version())))


def dali() -> Finding:
    found = version("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    if not found:
        return Finding("DALI", "none", install_line())
    try:
        import_graph()
    except Unavailable as error:
        return Finding("DALI", f"{found}, which cannot be loaded", str(error))
    return Finding("DALI", found)


Apex = Literal["nvidia", "nvidia without CUDA extensions", "another project", "none"]


def installed_apex() -> Apex:
    """Which package `import apex` would find, without running any of its code.

    PyPI's `apex` is a toolkit for web applications. NVIDIA's is installed from its repository and
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
    """NVIDIA apex, which is of use only with a GPU."""
    line = APEX_LINE if torch.cuda.is_available() else ""
    match installed_apex():
        case "nvidia":
            return Finding("NVIDIA apex", version("apex") or "found")
        case "nvidia without CUDA extensions":
            return Finding("NVIDIA apex", "built without its CUDA extensions", line)
        case "another project":
            found = "none; the installed `apex` is another project of that name, from PyPI"
            return Finding("NVIDIA apex", found, "pip uninstall apex" + (line and f"; {line}"))
        case "none":
            return Finding("NVIDIA apex", "none" if line else "none (for GPUs)", line)
