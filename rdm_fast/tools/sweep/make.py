"""A sweep from its command to its table and figure."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rdm_fast.config import Config
from rdm_fast.config.saved import config_to_dict, flat, rule
from rdm_fast.errors import (
    CannotCreate,
    ConfigMismatch,
    DataError,
    OutputFailed,
    UsageError,
    UserError,
)
from rdm_fast.run.folder import LOCK, PROJECT, RunFolder, read_config
from rdm_fast.runtime import atomic_files
from rdm_fast.tools.report import style
from rdm_fast.tools.report.read import Run, read_run
from rdm_fast.tools.sweep import results
from rdm_fast.tools.sweep.options import SweepCommand
from rdm_fast.tools.sweep.queue import Failure, run_all

MARK = "sweep.json"
"""Marks a folder as a sweep's, and holds its results."""
GRACE = 60.0
"""Seconds in which a run whose sweep was killed saves its last step and lets go of its folder."""


def make_sweep(command: SweepCommand) -> None:
    """Complete all runs of a sweep, then write sweep.json, sweep.md and sweep.png into its folder.

    Raises:
        UserError: the folder cannot be used, a run in it has other settings, a signal asked to
            stop, or some runs failed; the others are then complete, and table and figure written.
    """
    style.require_matplotlib("rdm sweep")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("rdm sweep starts processes of its own: leave torchrun out, see --jobs")
    folder = Path(command.config.out)
    _claim(folder)
    paths = {name: Path(config.out) for name, config in command.runs.items()}
    failed = _prepare_all(command)
    gpus = visible_gpus(command.config.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = min(command.jobs or len(gpus) or cores or 1, len(command.runs))
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (cores or 1) // jobs))
    where = f"on {len(gpus)} GPU(s)" if gpus else f"{threads} CPU thread(s) each"
    print(f"{len(command.runs)} runs in {folder}, {jobs} at a time, {where}", flush=True)
    started = time.monotonic()
    ready = {name: path for name, path in paths.items() if name not in failed}
    failed |= run_all(ready, jobs=jobs, device=command.config.device, gpus=gpus, threads=threads)
    runs = {name: read_run(path, name) for name, path in paths.items()}
    print("\n" + _write(folder, runs, failed, threads=threads, jobs=jobs))
    print(f"sweep: {folder / 'sweep.md'} and sweep.png, {time.monotonic() - started:.0f} s")
    if failed:
        _raise(failed)


def visible_gpus(device: str) -> list[str]:
    """The GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    if device == "cpu":
        return []
    import torch  # only to count, which leaves the GPUs as they are

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(i) for i in range(count)])[:count]


# ---- before ----------------------------------------------------------------------------------


def _claim(folder: Path) -> None:
    """Make the folder, unless it holds something else."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise CannotCreate(
            f"--out {folder} holds files of something else and no sweep of ours, so nothing is "
            "written there: name a new or empty folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MARK).exists():
            atomic_files.replace(folder / MARK, json.dumps({"project": PROJECT, "rows": []}) + "\n")
    except OSError as error:
        raise CannotCreate(
            f"--out {folder} cannot be written ({error.strerror}): give a folder that can"
        ) from error


def _prepare_all(command: SweepCommand) -> dict[str, Failure]:
    """Every run's folder; those that cannot be used, and why.

    Raises:
        ConfigMismatch: one was started with another configuration.
    """
    failed = {}
    for name, config in command.runs.items():
        try:
            _prepare(config, overwrite=command.overwrite)
        except (CannotCreate, DataError) as error:
            failed[name] = Failure(error.code, str(error))
    return failed


def _prepare(config: Config, *, overwrite: bool) -> None:
    """A run folder with this configuration, new or taken up again."""
    path = Path(config.out)
    with suppress(Timeout):
        if (path / LOCK).exists():
            FileLock(path / LOCK, thread_local=False).acquire(timeout=GRACE).lock.release()
    with RunFolder.open(config.out, config, overwrite=overwrite, rank=0) as run:
        if run.is_new:
            return
        before = flat(config_to_dict(read_config(path)))
        after = flat(config_to_dict(config))
        changed = [n for n in after if before[n] != after[n] and rule(n) != "free"]
        if changed:
            listed = ", ".join(f"{name} {before[name]} -> {after[name]}" for name in changed)
            raise ConfigMismatch(
                f"the run in {path} was started with another configuration ({listed}): give "
                "another --out, or start the whole sweep anew with --overwrite"
            )
        run.write_config(config)


# ---- after -----------------------------------------------------------------------------------


def _write(
    folder: Path, runs: Mapping[str, Run], failed: Mapping[str, Failure], *, threads: int, jobs: int
) -> str:
    """All that a sweep leaves besides its runs; the table."""
    rows = [results.row(run, name, failed.get(name)) for name, run in runs.items()]
    conditions = results.conditions(runs, threads, jobs)
    table = results.markdown(rows, conditions)
    plain = {
        "project": PROJECT,
        "conditions": conditions,
        "rows": [row.as_dict() for row in rows],
    }
    with style.applied():
        picture = results.figure(rows, runs)
    try:
        if picture:
            atomic_files.replace(folder / "sweep.png", picture.png)
        atomic_files.replace(folder / "sweep.md", table)
        atomic_files.replace(folder / MARK, json.dumps(plain, indent=1) + "\n")
    except OSError as error:
        raise OutputFailed(f"{folder} cannot be written ({error.strerror})") from error
    return table


def _raise(failed: Mapping[str, Failure]) -> None:
    """Name what failed, with the exit code of the first."""
    listed = "; ".join(f"{name}: {failure.sentence}" for name, failure in failed.items())
    code = next(iter(failed.values())).code
    kinds = (kind for kind in UserError.__subclasses__() if kind.code == code)
    raise next(kinds, UserError)(f"{len(failed)} run(s) failed: {listed}")
