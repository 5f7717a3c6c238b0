"""A signal at any moment of a command's life ends it with 75, and the same command goes on exactly.

RDM_FAULT_SIGNALS is the number of random signals of the campaign; RDM_FAULT_SEED draws them.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rdm_fast import __main__ as entries
from rdm_fast.data.loaders import workers
from rdm_fast.data.loaders.torch_loader import ViewsOfImages
from rdm_fast.errors import Interrupted
from rdm_fast.run import checkpoint
from rdm_fast.run.folder import RunFolder, read_status
from rdm_fast.runtime import atomic_files, signals
from rdm_fast.runtime.distributed import rank
from rdm_fast.runtime.signals import SIGNALS
from rdm_fast.training import trainer as trainer_module
from rdm_fast.training.train_step import TrainStep
from rdm_fast.training.trainer import Trainer
from tests.forks import PATIENCE, ROOT, Forked, call, environment, start
from tests.processes import final_bytes
from tests.ranks import run_ranks
from tests.runs import in_step, newest, run, with_log
from tests.tiny import command, tiny

WORDS = command("--log.every 1 --log.knn-every 1 --data.workers 0")
SECONDS = 0.05  # instead of signals.REPEAT


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert call("train.py", *WORDS, "--out", "run", cwd=folder).returncode == 0
    return final_bytes(folder / "run")


def assert_goes_on(folder: Path, undisturbed: dict[str, bytes]) -> None:
    """The same command ends with the bytes of an undisturbed run."""
    done = call("train.py", *WORDS, "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert final_bytes(folder / "run") == undisturbed


def assert_stopped(folder: Path, code: int, number: int, *, lines: int = 1) -> None:
    text = (folder / "err").read_text()
    assert code == 75, (signal.Signals(number).name, code, text)
    assert text.count("\n") == lines and "Traceback" not in text, text
    assert "error: stopped " in text, text
    if (folder / "run" / "status.json").exists():
        status = read_status(folder / "run")
        assert (status["state"], status["code"]) == ("interrupted", 75)


# ---- phases ----------------------------------------------------------------------------------


def itself(number: int, *_: object, **__: object) -> None:
    """Send this process a signal, and go on: to be ended is not this line's doing."""
    os.kill(os.getpid(), number)
    time.sleep(0.001)


def before(owner: object, name: str, number: int) -> None:
    """Send the signal when this function is called."""
    original = getattr(owner, name)

    def patched(*args: Any, **settings: Any) -> Any:
        itself(number)
        return original(*args, **settings)

    setattr(owner, name, patched)


PHASES: dict[str, tuple[object, str]] = {
    "a new folder": (atomic_files, "replace"),
    "its configuration": (RunFolder, "write_config"),
    "the index of images": (trainer_module, "load"),
    "the model": (trainer_module, "build_method"),
    "restoring": (checkpoint, "newest"),
    "the buckets of gradients": (TrainStep, "warm_up_ddp_buckets"),
    "the first line of output": (trainer_module, "summary"),
    "kNN": (Trainer, "_evaluate"),
    "a step": (TrainStep, "__call__"),
    "a save": (checkpoint, "save"),
    "deleting old checkpoints": (checkpoint, "_prune"),
}


GOES_ON = {"a new folder", "restoring", "a step", "a save"}


def trained_with_a_signal(phase: str, number: int, words: Sequence[str]) -> None:
    signals.catch()
    before(*PHASES[phase], number)
    sys.argv = ["train.py", *words]
    entries.train()


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_every_phase_of_training(
    phase: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    number = SIGNALS[list(PHASES).index(phase) % len(SIGNALS)]
    words = [*WORDS, "--out", "run"]
    process = Forked(
        trained_with_a_signal, phase, number, words,
        out=tmp_path / "out", err=tmp_path / "err", cwd=tmp_path,
    )  # fmt: skip
    assert_stopped(tmp_path, process.wait(), number)
    if phase in GOES_ON:
        assert_goes_on(tmp_path, undisturbed)


def signaled_after(function: str, number: int, words: Sequence[str]) -> None:
    """A run that gets a signal once this function of its session has returned."""
    from rdm_fast.training import session

    owner, name = {"fit": (Trainer, "fit"), "finished": (session, "_train_in")}[function]
    original = getattr(owner, name)

    def patched(*args: Any, **settings: Any) -> None:
        original(*args, **settings)
        itself(number)

    setattr(owner, name, patched)
    sys.argv = ["train.py", *words]
    entries.train()


@pytest.mark.parametrize(("after", "codes"), [("fit", (75, 0)), ("finished", (0,))])
def test_a_signal_after_the_last_step(
    after: str, codes: tuple[int, ...], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    words = [*WORDS, "--out", "run"]
    process = Forked(signaled_after, after, signal.SIGTERM, words, out=tmp_path / "out",
                     err=tmp_path / "err", cwd=tmp_path)  # fmt: skip
    code = process.wait()
    assert code in codes, (tmp_path / "err").read_text()
    assert read_status(tmp_path / "run")["code"] == code
    assert_goes_on(tmp_path, undisturbed)


def waits_in_cpp(words: Sequence[str]) -> None:
    """A run whose main thread waits in C++, as in a collective, when the signal comes."""

    def load(*_: Any) -> None:
        store = torch.distributed.FileStore("store", 2)
        print("loading", flush=True)
        store.wait(["never"], timedelta(seconds=100))

    trainer_module.load = load  # type: ignore[assignment]
    sys.argv = ["train.py", *words]
    entries.train()


def test_a_main_thread_that_waits_for_other_ranks_does_not_hold_a_signal_up(
    tmp_path: Path,
) -> None:
    words = [*WORDS, "--out", "run"]
    process = Forked(waits_in_cpp, words, out=tmp_path / "out", err=tmp_path / "err", cwd=tmp_path)
    out = tmp_path / "out"
    wait_until(process, lambda: out.exists() and "loading" in out.read_text())
    process.send_signal(signal.SIGHUP)
    assert_stopped(tmp_path, process.wait(20), signal.SIGHUP)


def waits_for_a_batch(words: Sequence[str]) -> None:
    """A run whose fourth batch never comes."""
    made = []

    def stuck(*_: Any, **__: Any) -> Any:
        made.append(1)
        return original(*_, **__) if len(made) < 4 else time.sleep(1000)

    original = ViewsOfImages.__call__
    ViewsOfImages.__call__ = stuck  # type: ignore[method-assign]
    workers.LAST = 0.5
    multiprocessing.set_start_method("fork", force=True)  # a worker that inherits this
    sys.argv = ["train.py", *words]
    entries.train()


def test_a_batch_that_never_comes_does_not_hold_a_signal_up(
    undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    words = [*WORDS, "--out", "run", "--data.loader", "torch", "--data.workers", "1"]
    process = Forked(waits_for_a_batch, words, out=tmp_path / "out", err=tmp_path / "err",
                     cwd=tmp_path)  # fmt: skip
    out = tmp_path / "out"
    wait_until(process, lambda: out.exists() and "step 3/" in out.read_text())
    process.send_signal(signal.SIGTERM)
    assert_stopped(tmp_path, process.wait(60), signal.SIGTERM)
    assert read_status(tmp_path / "run")["checkpoint"] == "step-00000003"


def stopped_on_ranks(out: Path) -> str:
    """Where two ranks stop after a signal to one of them in step 3, if no step is logged."""

    def prepare(trainer: Trainer) -> None:
        if rank() == 1:
            in_step(trainer, 3, Trainer.ask_to_stop)

    with pytest.raises(Interrupted):
        run(out, with_log(tiny(), every=100, save_every=100, spectrum_every=0), prepare)
    torch.distributed.barrier()
    return newest(out).name


def test_ranks_stop_within_two_steps_of_a_signal_to_one(tmp_path: Path) -> None:
    stopped = run_ranks(2, stopped_on_ranks, tmp_path / "run", tmp_path=tmp_path)
    assert stopped == ["step-00000004"] * 2


def wait_until(process: Forked | subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)


# ---- other commands --------------------------------------------------------------------------


def parsed_with_a_signal(number: int, words: Sequence[str]) -> None:
    from rdm_fast.cli.parse import Command

    before(Command, "parse", number)
    sys.argv = ["rdm", *words]
    entries.main()


@pytest.mark.parametrize(
    "name", ["train", "eval", "doctor", "preview", "export", "report", "sweep"]
)
def test_a_signal_in_every_command(name: str, tmp_path: Path) -> None:
    process = Forked(parsed_with_a_signal, signal.SIGINT, [name, "runs/a"], out=tmp_path / "out",
                     err=tmp_path / "err", cwd=tmp_path)  # fmt: skip
    assert_stopped(tmp_path, process.wait(), signal.SIGINT)


# ---- which signals count ---------------------------------------------------------------------


def with_hangup_ignored(words: Sequence[str]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    trained_with_a_signal("a step", signal.SIGHUP, words)


def test_nohup_is_respected(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    process = Forked(with_hangup_ignored, [*WORDS, "--out", "run"], out=tmp_path / "out",
                     cwd=tmp_path)  # fmt: skip
    assert process.wait() == 0, (tmp_path / "out").read_text()
    assert final_bytes(tmp_path / "run") == undisturbed


def with_two_signals(
    pause: float, orphaned: bool, first: int, second: int, words: Sequence[str]
) -> None:
    signals.REPEAT = SECONDS

    def twice(_: Trainer) -> None:
        if orphaned:  # its launcher, of another number, has ended
            signals._State.parent = -1
        os.kill(os.getpid(), first)
        time.sleep(pause)
        os.kill(os.getpid(), second)
        time.sleep(10 * SECONDS)

    fit = Trainer.fit
    Trainer.fit = lambda self: (in_step(self, 3, twice), fit(self))  # type: ignore[assignment]
    sys.argv = ["train.py", *words]
    entries.train()


@pytest.mark.parametrize(
    ("pause", "orphaned", "step"),
    [
        (0.0, False, "step-00000003"),
        (4 * SECONDS, False, "step-00000002"),
        (4 * SECONDS, True, "step-00000003"),  # the kernel says again that the launcher has ended
    ],
)
def test_only_a_later_second_signal_stops_at_once(
    pause: float, orphaned: bool, step: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    process = Forked(with_two_signals, pause, orphaned, signal.SIGINT, signal.SIGTERM,
                     [*WORDS, "--out", "run"], out=tmp_path / "out", err=tmp_path / "err",
                     cwd=tmp_path)  # fmt: skip
    assert_stopped(tmp_path, process.wait(), signal.SIGTERM)
    assert read_status(tmp_path / "run")["checkpoint"] == step
    assert_goes_on(tmp_path, undisturbed)


def with_a_worker(number: int) -> None:
    """A process whose forked child gets a signal."""
    signals.catch()
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), number)
        time.sleep(0.2)
        os._exit(3)
    time.sleep(0.2)
    _, status = os.waitpid(child, 0)
    sys.exit(os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, 3), (signal.SIGHUP, 3)]
)
def test_a_signal_to_a_data_worker_is_not_one_to_the_run(
    number: int, end: int, tmp_path: Path
) -> None:
    process = Forked(with_a_worker, number, out=tmp_path / "out")
    assert process.wait() == end, (tmp_path / "out").read_text()


# ---- a real process, and a campaign ----------------------------------------------------------


def listens(pid: int) -> bool:
    """Whether the process has a handler for SIGUSR1."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="sees handlers through /proc")
@pytest.mark.parametrize(
    ("script", "delay"),
    [(["train.py", *WORDS], 0.0), (["train.py", *WORDS], 0.7), (["-m", "rdm_fast", "train"], 0.2)],
)
def test_a_signal_while_python_imports(script: list[str], delay: float, tmp_path: Path) -> None:
    """Before torch, tyro or yaml are imported, and in the middle of it."""
    script = [str(ROOT / word) if word == "train.py" else word for word in script]
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, *script, "--out", "run"], env=environment(), stderr=err, cwd=tmp_path
        )
    wait_until(process, lambda: listens(process.pid))
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    assert_stopped(tmp_path, process.wait(PATIENCE), signal.SIGINT)
    assert delay > 0.5 or not (tmp_path / "run").exists()  # a fast machine is past the imports


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sees handlers through /proc")
def test_random_signals_at_random_moments(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """Each start gets one, until the run is finished; then there is another run."""
    seed = int(os.environ.get("RDM_FAULT_SEED", "0"))
    count, sent, runs, ends = int(os.environ.get("RDM_FAULT_SIGNALS", "12")), 0, 0, {0: 0, 75: 0}
    draw, longest = random.Random(seed), 0.0
    while sent < count:
        runs += 1
        folder = tmp_path / str(runs)
        folder.mkdir()
        code, longest = 75, max(longest, 1.0)
        while code:
            (folder / "err").unlink(missing_ok=True)
            process = start("train.py", *WORDS, "--out", "run", out=folder / "out",
                            err=folder / "err", cwd=folder)  # fmt: skip
            wait_until(process, partial(listens, process.pid))
            began = time.monotonic()
            time.sleep(draw.choice([draw.uniform(0, 0.05), draw.uniform(0, longest)]))
            number = draw.choice(SIGNALS)
            if process.poll() is None:
                sent += 1
                process.send_signal(number)
            code = process.wait()
            ends[code] = ends.get(code, 0) + 1
            if code:
                assert_stopped(folder, code, number)
            else:
                longest = max(longest, time.monotonic() - began)
        assert read_status(folder / "run")["state"] == "finished"
        assert final_bytes(folder / "run") == undisturbed
    print(f"seed {seed}: {sent} signals to {runs} runs, which ended with {ends}")
    assert set(ends) == {0, 75}
