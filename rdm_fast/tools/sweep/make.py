"""Runs a whole sweep: prepares the folders, completes the runs, writes table and figure."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rdm_fast.config import Config
from rdm_fast.config.saved import deciding_changes
from rdm_fast.errors import CannotCreate, ConfigMismatch, DataError, OutputFailed, UserError
from rdm_fast.run import schema
from rdm_fast.run.folder import PROJECT, RunFolder, read_config
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.printing import print_line
from rdm_fast.runtime.untrusted import read_table
from rdm_fast.tools.report import style
from rdm_fast.tools.report.read import Run, read_run
from rdm_fast.tools.sweep import results
from rdm_fast.tools.sweep.methods import TITLES
from rdm_fast.tools.sweep.options import SweepCommand
from rdm_fast.tools.sweep.queue import Failure, run_all

MARK = "sweep.json"
"""Marks a folder as a sweep and holds its results."""
GRACE = 60.0
"""Seconds that a run gets to save and unlock its folder after its sweep was killed."""


def make_sweep(command: SweepCommand) -> None:
    """Complete all runs of a sweep, then write sweep.json, sweep.md, sweep.png and branches.png.

    Raises:
        UserError: the folder cannot be used, a run in it has other settings, a signal asked the
            sweep to stop, or some runs failed. Failed runs are reported last: the others are then
            complete, and table and figure are written.
    """
    style.require_matplotlib("rdm sweep")
    folder = Path(command.config.out)
    _claim(folder)
    paths = {name: Path(config.out) for name, config in command.runs.items()}
    failed = _prepare_all(command)
    gpus = visible_gpus(command.config.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = min(command.jobs or len(gpus) or cores or 1, len(command.runs))
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (cores or 1) // jobs))
    where = f"on {len(gpus)} GPU(s)" if gpus else f"{threads} CPU thread(s) each"
    print_line(f"{len(command.runs)} runs in {folder}, {jobs} at a time, {where}")
    started = time.monotonic()
    ready = {name: path for name, path in paths.items() if name not in failed}
    failed |= run_all(ready, jobs=jobs, device=command.config.device, gpus=gpus, threads=threads)
    titles = TITLES if command.over_methods else dict.fromkeys(paths, "")
    runs = {name: read_run(path, titles[name] or name) for name, path in paths.items()}
    rows = [results.row(run, name, failed.get(name), titles[name]) for name, run in runs.items()]
    kind = "method" if command.over_methods else "filter"
    where = results.conditions(runs, threads, jobs)
    table = results.markdown(rows, where, kind)
    _write(folder, rows, runs, table, where)
    print_line("", *table.splitlines())
    print_line(f"sweep: {folder / 'sweep.md'} and figures, {time.monotonic() - started:.0f} s")
    if failed:
        _raise(failed)


def visible_gpus(device: str) -> list[str]:
    """GPUs that runs may use, by their names in CUDA_VISIBLE_DEVICES; none on a CPU."""
    if device == "cpu":
        return []
    import torch  # counting does not initialize the GPUs

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(i) for i in range(count)])[:count]


# ---- before ----------------------------------------------------------------------------------


def _claim(folder: Path) -> None:
    """Create the folder and mark it as a sweep.

    Raises:
        CannotCreate: it holds other files, or cannot be written.
        DataError: its sweep.json is damaged, or another program's.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise CannotCreate(
            f"--out {folder} holds other files and no sweep: name a new or empty folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MARK).exists():
            mark = {"project": schema.one_of([PROJECT])}
            schema.require(read_table(folder / MARK), mark, folder / MARK)
        else:
            atomic_files.replace(folder / MARK, json.dumps({"project": PROJECT, "rows": []}) + "\n")
    except OSError as error:
        raise CannotCreate(
            f"--out {folder} cannot be written ({error.strerror}): name another folder"
        ) from error


def _prepare_all(command: SweepCommand) -> dict[str, Failure]:
    """Make or reopen every run folder; returns the runs whose folder cannot be used, and why.

    Raises:
        ConfigMismatch: a run was started with another configuration.
    """
    failed = {}
    for name, config in command.runs.items():
        try:
            _prepare(config, overwrite=command.overwrite)
        except (CannotCreate, DataError) as error:
            failed[name] = Failure(error.code, str(error))
    return failed


def _prepare(config: Config, *, overwrite: bool) -> None:
    path = Path(config.out)
    if path.is_symlink():
        raise CannotCreate(f"{path} is a link, not a run of this sweep: delete it")
    with RunFolder.open(config.out, config, overwrite=overwrite, rank=0, patience=GRACE) as run:
        if run.is_new:
            return
        if changed := deciding_changes(read_config(path), config):
            listed = ", ".join(f"{name} {change}" for name, change in changed.items())
            raise ConfigMismatch(
                f"the run in {path} was started with another configuration ({listed}): give "
                "another --out, or restart the whole sweep with --overwrite"
            )
        run.write_config(config)


# ---- after -----------------------------------------------------------------------------------


def _write(
    folder: Path, rows: Sequence[results.Row], runs: Mapping[str, Run], table: str, where: str
) -> None:
    """Write table, figures and results."""
    from rdm_fast.tools.sweep.comparison import compare

    plain = {"project": PROJECT, "conditions": where, "rows": [asdict(row) for row in rows]}
    with style.applied():
        pictures = [results.figure(rows, runs), compare(list(runs.values()))]
    try:
        for picture in filter(None, pictures):
            atomic_files.replace(folder / f"{picture.name}.png", picture.png)
        atomic_files.replace(folder / "sweep.md", table)
        atomic_files.replace(folder / MARK, json.dumps(plain, indent=1) + "\n")
    except OSError as error:
        raise OutputFailed(f"{folder} cannot be written ({error.strerror})") from error


def _raise(failed: Mapping[str, Failure]) -> None:
    """Raise an error that lists the failed runs, with the exit code of the first."""
    listed = "; ".join(f"{name}: {failure.sentence}" for name, failure in failed.items())
    code = next(iter(failed.values())).code
    kinds = (kind for kind in UserError.__subclasses__() if kind.code == code)
    raise next(kinds, UserError)(f"{len(failed)} run(s) failed: {listed}")
