"""The machine of a measurement, and the least time that it can take."""

import datetime
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]


class Peak(NamedTuple):
    """Dense operations and bytes per second, as the maker states them."""

    bf16: float
    tf32: float
    fp32: float
    fp64: float
    bytes: float


# NVIDIA H100 and H200 datasheets, SXM; fp64 is that of the tensor cores.
H100 = Peak(989e12, 494e12, 67e12, 67e12, 3.35e12)
PEAKS = {"H100": H100, "H200": H100._replace(bytes=4.8e12)}
SLOWER = ("PCIe", "NVL")  # variants of the same name with lower peaks


def peak(device: str) -> Peak | None:
    """Of a GPU of this name; None if unknown."""
    if any(word in device for word in SLOWER):
        return None
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def floor(peak: Peak, bytes_moved: float, flops: Mapping[str, float]) -> float:
    """Lower bound on the seconds of any implementation whose data come from memory, not a cache.

    Args:
        bytes_moved: each input read once, each output written once.
        flops: operations in each arithmetic; the keys are fields of `Peak`.
    """
    arithmetic = sum(count / getattr(peak, unit) for unit, count in flops.items())
    return max(arithmetic, bytes_moved / peak.bytes)


def device_name() -> str:
    """Of the GPU, else of the CPU. It imports no yaml, as `rdm_fast.run.environment` does."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    return f"CPU ({found[1] if found else platform.machine()})"


def describe() -> dict[str, str | int]:
    """Device, versions, date and commit, as JSON values."""
    return {
        "device": device_name(),
        "driver": _driver(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": triton.__version__,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _run(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _run(query).partition("\n")[0] if torch.cuda.is_available() else ""


def _run(command: list[str]) -> str:
    """Its output; empty if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
