"""The environment of a run: versions, machine, ranks, configuration, and what `auto` chose."""

import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rdm_fast.config import Config
from rdm_fast.config.saved import config_to_dict
from rdm_fast.run.folder import version


def describe_environment(
    config: Config, *, device: torch.device, world_size: int, loader: str, engine: str
) -> dict[str, Any]:
    """The first line of `metrics.jsonl`, as JSON values.

    Args:
        loader: the loader in use, never `auto`.
        engine: the filter engine in use, or "none".
    """
    return {
        "rdm_fast": version(),
        "git": _git_commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": _installed("torchvision"),
        "triton": _installed("triton"),
        "device": _device_name(device),
        "world_size": world_size,
        "global_batch": config.optim.global_batch,
        "local_batch": config.optim.local_batch(world_size),
        "loader": loader,
        "engine": engine,
        "precision": config.precision,
        "config": config_to_dict(config),
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit(root: Path | None = None) -> str | None:
    """Commit of a checkout, this file's by default, `-dirty` if changed; None if it is none.

    `git describe` would write to the checkout: it saves what it has learned of the files' times.
    """
    root = root or Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed copy may lie inside another project's checkout
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "status", "--porcelain=v2"]
    try:
        done = subprocess.run(
            [*command, "--branch", "--untracked-files=no"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    head, lines = "# branch.oid ", done.stdout.splitlines()
    commits = [line.removeprefix(head) for line in lines if line.startswith(head)]
    changed = any(not line.startswith("#") for line in lines)
    return commits[0] + "-dirty" * changed if commits else None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_property("model name") or platform.machine()


def cpu_property(name: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A field of the first core in Linux's /proc/cpuinfo; empty where there is none."""
    with suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            field, _, value = line.partition(":")
            if field.strip() == name:
                return value.strip()
    return ""
