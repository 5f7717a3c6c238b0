"""Processes forked from a server that has imported torch and rdm_fast: a start takes milliseconds.

The server is multiprocessing's fork server, one for each pytest process, started on first use. It
runs no threads, so forking it is safe. It ends with pytest, and its children end with it.

A forked process has a pid, session, environment, folder and output of its own, and signals do to
it what they do to `python train.py`. But variables that torch, triton or rdm_fast read when they
are imported (TRITON_INTERPRET) have pytest's values, and there is no GPU.

    done = call("train.py", "digits_byol", "--optim.epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    process = start("rdm", "train", "--out", "run", cwd=tmp_path, out=tmp_path / "log")
    process.terminate()
    assert process.wait(timeout=60) == 75
"""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rdm_fast.runtime.launcher import OF_A_RANK

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0  # seconds; a shared machine may give a process a tenth of a core
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ENTRIES = {"train.py": "train", "eval_linear.py": "evaluate", "rdm": "main"}
PRELOADED = ["rdm_fast.cli.commands", "rdm_fast.evaluation.run", "sklearn.datasets"]
PRELOADED += ["hypothesis", "tests.runs"]

BUG = 70
ended_with_a_bug: list[str] = []
"""What ended with code 70 during the present test, which fails for it (tests.conftest)."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)


def environment() -> dict[str, str]:
    """For a process that finds the checkout, uses one thread and no GPU, and is not a rank."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",  # the host's name need not resolve
    }


class Forked:
    """A function of a module in a forked process, with the methods of `subprocess.Popen`.

    Args:
        function: called with args, which must pickle; SystemExit sets the exit code.
        out, err: files that stdout and stderr are appended to; without `err` both go to `out`.
        cwd: the process's folder; by default this process's.
        env: the whole environment; by default `environment()`.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *args: Any,
        out: Path,
        err: Path | None = None,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        start_server()
        self._process = _CONTEXT.Process(
            target=_run,
            args=(env or environment(), cwd or Path.cwd(), (out, err or out), function, args),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, -n after signal n, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code after the end; subprocess.TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        if self.returncode == BUG:
            ended_with_a_bug.append(f"process {self.pid}")
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(script: str, *words: object, **settings: Any) -> Forked:
    """Start `train.py`, `eval_linear.py` or `rdm` with these words; settings as of `Forked`."""
    return Forked(_command, script, *map(str, words), **settings)


def call(
    script: str, *words: object, cwd: Path, timeout: float = PATIENCE, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a folder, with variables added to `environment()`."""
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(script, *words, out=out, err=err, cwd=cwd, env=environment() | variables)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        done = [script, *map(str, words)]
        return subprocess.CompletedProcess(done, code, out.read_text(), err.read_text())


def start_server() -> None:
    """Start the server unless it runs; it imports PRELOADED before it forks."""
    with mock.patch.dict(os.environ, environment()):
        forkserver.ensure_running()


def enter() -> None:
    """Called first in a forked process: one thread, and an end when the server and pytest end."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    server = forkserver._forkserver  # type: ignore[attr-defined]
    os.close(server._forkserver_alive_fd)  # the server ends once no process holds this


def _run(
    env: dict[str, str],
    cwd: Path,
    files: tuple[Path, Path],
    function: Callable[..., object],
    args: tuple[Any, ...],
) -> None:
    enter()
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    function(*args)


def _command(script: str, *words: str) -> None:
    from rdm_fast import __main__ as entries

    sys.argv = [script, *words]
    getattr(entries, ENTRIES[script])()
