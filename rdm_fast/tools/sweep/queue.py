"""Runs commands as processes, several at a time, each on its own GPU or share of the cores.

A run is trained and then evaluated with the commands that a user would give: `rdm train --resume
RUN` and `rdm eval RUN`. The run folder shows which command is next, so the queue keeps no state.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rdm_fast.errors import Interrupted, RankLost, UserError
from rdm_fast.run.folder import read_status
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.launcher import OF_A_RANK, PARENT
from rdm_fast.runtime.printing import print_line
from rdm_fast.runtime.signals import StopOnSignal

PROGRAM = "from rdm_fast.__main__ import main; main()"
POLL = 0.1  # seconds between two checks of the processes


class Failure(NamedTuple):
    """Why a run is not complete: the exit code of its command, and its error."""

    code: int
    sentence: str


def next_command(run: Path, device: str) -> list[str] | None:
    """Arguments of the next `rdm` command for a run; None if it is complete."""
    status = read_status(run)
    if status["state"] != "finished":
        return ["train", "--resume", str(run)]
    if not any((run / "evaluation").glob(f"{status['checkpoint']}-*.json")):
        return ["eval", str(run), "--device", device]
    return None


@dataclass
class _Job:
    """A run under way."""

    name: str
    run: Path
    slot: int
    args: list[str] = field(default_factory=list)
    process: Any = None
    started: float = field(default_factory=time.monotonic)
    log_start: int = 0

    @property
    def log(self) -> Path:
        return self.run / "logs" / "sweep.log"

    def start(self, args: list[str], environment: Mapping[str, str]) -> None:
        self.args = args
        with atomic_files.appending(self.log) as log:
            self.log_start = log.seek(0, os.SEEK_END)
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *args],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def failure(self, code: int) -> Failure:
        """The command's exit code and its last error."""
        text = atomic_files.read(self.log)[self.log_start :].decode("utf-8", "replace")
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        if code < 0:
            killed = f"{self.args[0]} was killed by {signal.Signals(-code).name}"
            return Failure(RankLost.code, f"{killed}: run the same command again")
        said = errors[-1].removeprefix("error: ") if errors else f"see {self.log}"
        return Failure(code, said)


def run_all(
    runs: Mapping[str, Path], *, jobs: int, device: str, gpus: Sequence[str], threads: int
) -> dict[str, Failure]:
    """Complete every run; a failed one does not stop the others.

    Args:
        runs: run folders by name, in starting order.
        jobs: number of runs at a time.
        device: --device of evaluations; training reads it from the run's configuration.
        gpus: names for CUDA_VISIBLE_DEVICES, one per run; empty to leave the variable alone.
        threads: OMP_NUM_THREADS of each process, unless it is set.

    Returns:
        The runs that are not complete, and why.

    Raises:
        Interrupted: a signal asked the sweep to stop; all runs under way have saved.
    """
    waiting, free = deque(runs), deque(range(jobs))
    working: list[_Job] = []
    failed: dict[str, Failure] = {}

    def start_next(job: _Job) -> bool:
        """Start the run's next command; False if there is none."""
        args = next_command(job.run, device)
        if args is None or args == job.args:
            if args is not None:
                failed[job.name] = Failure(UserError.code, f"rdm {args[0]} did not complete it")
            return False
        job.start(args, _environment(gpus[job.slot % len(gpus)] if gpus else None, threads))
        return True

    stop: list[bool] = []
    with StopOnSignal(lambda: stop.append(True)):
        while (waiting or working) and not stop:
            while waiting and free:
                name = waiting.popleft()
                job = _Job(name, runs[name], free.popleft())
                if start_next(job):
                    print_line(f"{name}: {job.args[0]} ({len(runs) - len(waiting)} of {len(runs)})")
                    working.append(job)
                else:
                    print_line(f"{name}: already complete")
                    free.append(job.slot)
            time.sleep(POLL)
            for job in [job for job in working if job.process.poll() is not None]:
                code = job.process.returncode
                if code == 0 and start_next(job):
                    continue
                if code != 0:
                    failed[job.name] = job.failure(code)
                ended = f"complete, {time.monotonic() - job.started:.0f} s"
                if job.name in failed:
                    ended = f"failed: {failed[job.name].sentence}"
                print_line(f"{job.name}: {ended}")
                working.remove(job)
                free.append(job.slot)
        if waiting or working:
            for job in working:
                job.process.send_signal(signal.SIGTERM)
            for job in working:
                job.process.wait()
            raise Interrupted("stopped by a signal, runs are saved: run the same command again")
    return failed


def _environment(gpu: str | None, threads: int) -> dict[str, str]:
    """For a process that imports the same modules and is not a rank."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    kept[PARENT] = str(os.getpid())
    kept.setdefault("OMP_NUM_THREADS", str(threads))
    if gpu is not None:
        kept["CUDA_VISIBLE_DEVICES"] = gpu
    return kept
