"""`--nproc N`: start N ranks on this machine, watch them, and exit with their code.

Ranks meet through a file in a private folder and talk over the loopback interface, so nothing
listens for other machines. They are processes of this one, without torch's elastic agent, which
hides their exit codes and meets again at the store of dead ranks after a restart.

A signal is passed on, and ranks have time to save. If a rank fails, so do the others: they get a
moment to report it. If this process dies, the kernel asks the ranks to save and stop.
"""

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import rdm_kernels
from rdm_fast.errors import Interrupted, RankLost, Unavailable, UserError
from rdm_fast.runtime.launcher import OF_A_RANK, PARENT, STORE
from rdm_fast.runtime.printing import print_line
from rdm_fast.runtime.signals import SIGNALS, StopOnSignal

CONSEQUENCES = {RankLost.code, Interrupted.code}
SAVING = 120.0  # seconds to save and end, after a signal
FAILING = 3.0  # seconds to lose a rank that has failed, to report it, and to end
LOSING = 1.0  # the same, for ranks that another one has taken for lost
INSISTING = 5.0  # seconds to end at once, after a second signal
POLL = 0.05  # seconds between two checks of the ranks


def ranks_on(nproc: str) -> int:
    """The number of ranks for `--nproc`: a number; gpu, one a GPU; auto, the same or else one.

    Raises:
        Unavailable: nproc=gpu without a GPU.
    """
    if nproc not in ("gpu", "auto"):
        return int(nproc)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if nproc == "gpu" and count == 0:
        raise Unavailable("--nproc gpu: there is no GPU; give a number of ranks, or --nproc auto")
    return max(count, 1)


def launch(
    command: Sequence[str], ranks: int, *, restarts: int = 0, again: Sequence[str] | None = None
) -> tuple[int, UserError | None]:
    """Run a Python command as several ranks, until all have ended or one has failed.

    Args:
        command: the arguments of `python`, such as `["-m", "rdm_fast", "train"]`.
        ranks: number of processes; torchrun's variables number them.
        restarts: how often all ranks are started again after one was lost.
        again: the command of these; by default the same.

    Returns:
        The exit code: 0 if all ranks had 0. And an error if no rank can have reported it.
    """
    with tempfile.TemporaryDirectory(prefix="rdm-ranks-") as folder:
        for attempt in range(restarts + 1):
            group = _Ranks()
            with StopOnSignal(group.stop, group.insist):
                group.start(command, ranks, Path(folder, f"meeting-{attempt}"))
                codes = group.wait()
            code, error = _ending(codes, stopped=group.wishes > 0)
            if code != RankLost.code or attempt == restarts:
                break
            reason = error or "a rank was lost"
            print_line(
                f"warning: restart {attempt + 1} of {restarts} from the last checkpoint: {reason}",
                file=sys.stderr,
            )
            command = again or command
    return code, error


class _Ranks:
    """The processes of one start, each the leader of a group, which its data workers are in."""

    def __init__(self) -> None:
        self.wishes = self.sent = 0
        self.deadline = math.inf
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str], ranks: int, meeting: Path) -> None:
        """Start the ranks of a command, which meet through a new file."""
        with _blocked():
            for rank in range(ranks):
                settings = _environment(rank, ranks, meeting)
                words = [sys.executable, "-P", "-u", *command]
                self.processes.append(subprocess.Popen(words, env=settings, process_group=0))

    def stop(self) -> None:
        """Ask all ranks to save and end."""
        self.wishes = max(self.wishes, 1)

    def insist(self) -> None:
        """Ask all ranks to end at once."""
        self.wishes = 2

    def wait(self) -> dict[int, int]:
        """Wait until no rank is left; the exit codes, -SIGTERM for one that had to be killed."""
        killed = set()
        while running := [process for process in self.processes if process.poll() is None]:
            code = next((p.returncode for p in self.processes if p.returncode), 0)
            if code == Interrupted.code:
                self.wishes = max(self.wishes, 1)
            elif code:
                self._wait_for(LOSING if code == RankLost.code else FAILING)
            if self.sent < self.wishes:
                self.sent = self.wishes
                self._wait_for(SAVING if self.wishes == 1 else INSISTING)
                for process in running:
                    process.send_signal(signal.SIGTERM)
            for process in running:
                if time.monotonic() > self.deadline or (code and _is_stopped(process.pid)):
                    killed.add(process)
                    process.kill()
            time.sleep(POLL)
        for process in self.processes:
            with suppress(ProcessLookupError):  # data workers of a rank that was killed
                os.killpg(process.pid, signal.SIGKILL)
        return {
            rank: -signal.SIGTERM if process in killed else process.returncode
            for rank, process in enumerate(self.processes)
        }

    def _wait_for(self, seconds: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + seconds)


def _ending(codes: Mapping[int, int], *, stopped: bool) -> tuple[int, UserError | None]:
    """The exit code for these codes by rank, -n for signal n, and the error if no rank has one.

    When a rank ends, the others lose it or are ended: that is a consequence, not the reason.
    """
    reasons = [code for code in codes.values() if code > 0 and code not in CONSEQUENCES]
    if reasons or not any(codes.values()):
        return (reasons[0] if reasons else 0), None
    found = set(codes.values())
    if stopped:
        return Interrupted.code, None if found & CONSEQUENCES else Interrupted(
            "stopped by a signal before anything was saved: run the same command again"
        )
    killed = {rank: -code for rank, code in codes.items() if code < 0}
    by_others = {rank: number for rank, number in killed.items() if number != signal.SIGTERM}
    rank, number = next(iter((by_others or killed or {0: 0}).items()))
    how = f"was ended by {_name(number)} from outside (SIGKILL often means that memory ran out)"
    if not by_others and found & CONSEQUENCES:
        if RankLost.code not in found:
            return Interrupted.code, None
        if codes[0] != -signal.SIGTERM:
            return RankLost.code, None
        how = "hung"
    return RankLost.code, RankLost(
        f"rank {rank} {how}: run the same command again to continue from the last checkpoint"
    )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _is_stopped(pid: int) -> bool:
    """Whether a process is suspended (SIGSTOP), so that no other signal reaches it."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


@contextmanager
def _blocked() -> Iterator[None]:
    """Context in which a process starts with our signals blocked, until `signals.catch` there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment(rank: int, ranks: int, meeting: Path) -> dict[str, str]:
    """A rank's variables: it runs this very code, and knows who and where it is."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    code = [str(Path(__file__).parents[2]), str(Path(str(rdm_kernels.__file__)).parents[1])]
    given = [kept["PYTHONPATH"]] if kept.get("PYTHONPATH") else []
    interface = "lo" if sys.platform == "linux" else ""
    defaults = {"OMP_NUM_THREADS": "1"} | (  # as torchrun does
        {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    )
    return defaults | kept | {
        "PYTHONPATH": os.pathsep.join([*code, *given]),
        "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        STORE: str(meeting), PARENT: str(os.getpid()),
    }  # fmt: skip
