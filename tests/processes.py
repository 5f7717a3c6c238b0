"""train.py as a process, or as several under torchrun, that tests may kill."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from rdm_fast.run import checkpoint
from rdm_fast.run.folder import read_status
from tests.forks import PATIENCE, ROOT, environment
from tests.tiny import command


class Run:
    """One start of the tiny run in a folder of its own; starting it again continues the run.

    Args:
        out: the run folder.
        epochs: of four steps each.
        world: number of ranks; more than one are started by torchrun.
        flags: more words for train.py.
    """

    def __init__(self, out: Path, epochs: int, world: int = 1, flags: str = "") -> None:
        self.out, self.steps, self.world = out, 4 * epochs, world
        self.log = out.with_name(f"{out.name}.log")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        words = command(f"--optim.epochs {epochs} --out {out} {flags}")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *(launcher if world > 1 else []), str(ROOT / "train.py"), *words],
                env=environment(), stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._ranks: list[int] = []

    @property
    def ranks(self) -> list[int]:
        """Process ids of the ranks started so far, in rank order."""
        if self.world == 1:
            return [self.process.pid]
        if len(self._ranks) < self.world:
            self._ranks = sorted(
                pid for pid in children(self.process.pid) if "train.py" in name(pid)
            )
        return self._ranks

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl tells of this step."""
        deadline = time.monotonic() + PATIENCE
        while self.last_step() < step:
            assert self.process.poll() is None, f"ended too early:\n{self.log.read_text()[-3000:]}"
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
        for pid in {self.process.pid, *self.ranks, *children(self.process.pid)}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.wait_for_ranks(5.0)

    def wait_for_ranks(self, seconds: float) -> float:
        """Until no rank is left; how long that took."""
        start = time.monotonic()
        while any(alive(pid) for pid in self.ranks):
            assert time.monotonic() - start < seconds, "ranks have outlived their launcher"
            time.sleep(0.01)
        return time.monotonic() - start

    def end(self) -> int:
        """Wait for it; the exit code."""
        return self.process.wait(timeout=PATIENCE)

    def finish(self) -> None:
        code = self.end()
        assert code == 0, f"exit code {code}:\n{self.log.read_text()[-3000:]}"
        assert read_status(self.out)["state"] == "finished"


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
