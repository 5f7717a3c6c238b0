"""Whole runs as processes that tests may kill: forked, or started afresh by torchrun or --nproc."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from rdm_fast.run import checkpoint
from rdm_fast.run.folder import read_status
from rdm_fast.runtime.launcher import STORE
from tests import forks
from tests.forks import PATIENCE, ROOT, Forked, environment
from tests.tiny import command

STEPS_PER_EPOCH = 4
FLAGS = "--log.every 1 --log.save-every 2"


class Run:
    """One start of the tiny run in a folder of its own; starting it again continues the run.

    Args:
        out: the run folder.
        epochs: of four steps each.
        world: number of ranks.
        flags: more of them, which differ from those of the tiny run.
        launcher: "" forks the ranks (tests.forks); torchrun and nproc start a fresh launcher, which
            starts fresh ranks.

    Attributes:
        processes: the ranks, or the launcher alone.
    """

    def __init__(
        self,
        out: Path,
        epochs: int,
        world: int = 1,
        launcher: Literal["", "torchrun", "nproc"] = "",
        flags: str = "",
    ) -> None:
        self.out, self.steps, self.world = out, STEPS_PER_EPOCH * epochs, world
        self.log = out.with_name(f"{out.name}.log")
        words = command(f"--optim.epochs {epochs} --out {out} {FLAGS} {flags}")
        self.processes: Sequence[Forked | subprocess.Popen[bytes]]
        self._ranks: list[int] = []
        if launcher:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
            before, after = (
                (torchrun, []) if launcher == "torchrun" else ([], ["--nproc", str(world)])
            )
            with self.log.open("ab") as log:
                self.processes = [
                    subprocess.Popen(
                        [sys.executable, *before, str(ROOT / "train.py"), *words, *after],
                        env=environment(), stdout=log, stderr=subprocess.STDOUT,
                    )
                ]  # fmt: skip
            return
        meeting = tempfile.mkdtemp(prefix="ranks-", dir=out.parent)
        self.processes = [
            forks.start(
                "train.py", *words, out=self.log,
                env=environment() | of_rank(rank, world, Path(meeting)),
            )
            for rank in range(world)
        ]  # fmt: skip
        self._ranks = [process.pid for process in self.processes]

    @property
    def ranks(self) -> list[int]:
        """Process ids of the ranks started so far, in rank order."""
        if len(self._ranks) < self.world:
            started = children(self.processes[0].pid)
            self._ranks = sorted(pid for pid in started if "train" in name(pid))
        return self._ranks

    def wait_for_step(self, step: int) -> None:
        """Wait until metrics.jsonl has this step."""
        deadline = time.monotonic() + PATIENCE
        while self.last_step() < step:
            assert self.processes[0].poll() is None, f"ended early:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"stuck:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.002)
        assert len(self.ranks) == self.world

    def last_step(self) -> int:
        """The step of the last whole line of metrics.jsonl, -1 before there is one."""
        with suppress(OSError, IndexError, ValueError):
            line = (self.out / "metrics.jsonl").read_bytes().splitlines()[-1]
            return int(json.loads(line).get("step", -1))
        return -1

    def kill(self) -> None:
        """kill -9 of the launcher and of every rank, as a node's failure would."""
        running = {process.pid for process in self.processes if process.poll() is None}
        under_launcher = {pid for parent in running for pid in children(parent)}
        orphans = {pid for pid in self.ranks if "train" in name(pid)}  # a pid may be reused
        for pid in running | under_launcher | orphans:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()
        self.wait_for_ranks()

    def wait_for_ranks(self) -> None:
        """Wait until no rank is left, which must not take long."""
        deadline = time.monotonic() + PATIENCE
        while any(alive(pid) for pid in self.ranks):
            assert time.monotonic() < deadline, "ranks have outlived their launcher"
            time.sleep(0.01)

    def wait(self) -> list[int]:
        """The exit codes: of each rank, or of the launcher."""
        return [process.wait(timeout=PATIENCE) for process in self.processes]

    def finish(self) -> None:
        """Wait for a good end."""
        codes = self.wait()
        assert not any(codes), f"exit codes {codes}:\n{self.log.read_text()[-3000:]}"
        assert read_status(self.out)["state"] == "finished"


def of_rank(rank: int, world: int, meeting: Path) -> dict[str, str]:
    """What the launcher tells a rank of several, which meet in a folder."""
    if world == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    return {STORE: f"{meeting}/store"} | {name: str(n) for name, n in numbers.items()}


def final_bytes(out: Path) -> dict[str, bytes]:
    """The tensor files of the newest checkpoint."""
    path = checkpoint.newest(out / "checkpoints", print)
    assert path is not None
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def children(pid: int) -> list[int]:
    with suppress(OSError):
        lists = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(child) for each in lists for child in each.read_text().split()]
    return []


def name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""
