"""Commands as processes, some at a time, each on a GPU or a share of the cores of its own.

A run is trained and then evaluated, each by the command a user would give: `rdm train --resume RUN`
and `rdm eval RUN`. What is left to do is read from the run folder, so that nothing has to be
remembered: a run that is finished and evaluated needs no command at all.
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
from typing import Any

from rdm_fast.errors import Interrupted, RankLost, UserError
from rdm_fast.run.folder import read_status
from rdm_fast.runtime.signals import StopOnSignal

PROGRAM = "from rdm_fast.cli.commands import main; main()"
LAUNCHED = "RDM_LAUNCHED"
"""Process id of the one that started this one, which is to save and stop when that is gone."""
POLL = 0.1  # seconds between two looks at the processes


@dataclass(frozen=True)
class Failure:
    """Why a run is not complete."""

    code: int
    """Exit code of its command."""
    sentence: str


def next_command(run: Path, device: str) -> list[str] | None:
    """What is left to do for a run, as words for `rdm`; None if it is complete."""
    status = read_status(run)
    if status["state"] != "finished":
        return ["train", "--resume", str(run)]
    if not any((run / "evaluation").glob(f"{status['checkpoint']}-*.json")):
        return ["eval", str(run), "--device", device]
    return None


@dataclass
class _Job:
    """A run that is being worked on."""

    name: str
    run: Path
    slot: int
    words: list[str] = field(default_factory=list)
    process: Any = None
    started: float = field(default_factory=time.monotonic)
    log_start: int = 0

    @property
    def log(self) -> Path:
        return self.run / "logs" / "sweep.log"

    def start(self, words: list[str], environment: Mapping[str, str]) -> None:
        self.words = words
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def failure(self, code: int) -> Failure:
        """What the command said last, and what it ended with."""
        text = self.log.read_bytes()[self.log_start :].decode("utf-8", "replace")
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        if code < 0:
            killed = f"{self.words[0]} was killed by {signal.Signals(-code).name}"
            return Failure(RankLost.code, f"{killed}: run the same command again")
        said = errors[-1].removeprefix("error: ") if errors else f"see {self.log}"
        return Failure(code, said)


def run_all(
    runs: Mapping[str, Path], *, jobs: int, device: str, gpus: Sequence[str], threads: int
) -> dict[str, Failure]:
    """Complete every run; one that fails does not keep the others from being run.

    Args:
        runs: folders that hold a configuration, by name, in the order in which they are started.
        jobs: runs at a time.
        device: as in --device, for evaluations; a run's own is in its configuration.
        gpus: as CUDA_VISIBLE_DEVICES names them; a run gets one. None: runs see what we see.
        threads: of a process on a CPU.

    Returns:
        The runs that are not complete, and why.

    Raises:
        Interrupted: a signal asked to stop; all runs under way have saved.
    """
    waiting, free = deque(runs), deque(range(jobs))
    working: list[_Job] = []
    failed: dict[str, Failure] = {}

    def go_on(job: _Job) -> bool:
        """Start the run's next command; False if there is none."""
        words = next_command(job.run, device)
        if words is None or words == job.words:
            if words is not None:
                failed[job.name] = Failure(UserError.code, f"rdm {words[0]} has not completed it")
            return False
        job.start(words, _environment(gpus[job.slot % len(gpus)] if gpus else None, threads))
        return True

    stop: list[bool] = []
    with StopOnSignal(lambda: stop.append(True)):
        while (waiting or working) and not stop:
            while waiting and free:
                name = waiting.popleft()
                job = _Job(name, runs[name], free.popleft())
                if go_on(job):
                    _say(f"{name}: {job.words[0]} ({len(runs) - len(waiting)} of {len(runs)})")
                    working.append(job)
                else:
                    _say(f"{name}: complete already")
                    free.append(job.slot)
            time.sleep(POLL)
            for job in [job for job in working if job.process.poll() is not None]:
                code = job.process.returncode
                if code == 0 and go_on(job):
                    continue
                if code != 0:
                    failed[job.name] = job.failure(code)
                why = failed.get(job.name)
                took = f"{time.monotonic() - job.started:.0f} s"
                _say(f"{job.name}: {f'failed: {why.sentence}' if why else f'complete, {took}'}")
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
    """Of a process that imports what we import, and is no rank of anybody's."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    kept[LAUNCHED] = str(os.getpid())
    kept.setdefault("OMP_NUM_THREADS", str(threads))
    if gpu is not None:
        kept["CUDA_VISIBLE_DEVICES"] = gpu
    return kept


def _say(text: str) -> None:
    print(text, flush=True)
