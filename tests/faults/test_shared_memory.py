"""A run never waits for ever for its images: a lost or stopped worker ends it in one line."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rdm_fast.data.loaders import workers
from rdm_fast.data.loaders.batch import Indices
from rdm_fast.data.loaders.workers import in_workers, require_shared_memory
from rdm_fast.errors import Unavailable, WorkersFailed
from rdm_fast.training.trainer import Trainer
from tests.forks import ROOT, environment
from tests.runs import CPU, newest, run
from tests.tiny import command, tiny

PARTS = [np.arange(start, start + 4) for start in range(0, 24, 4)]


def make(indices: Indices) -> tuple[Tensor, ...]:
    return (torch.from_numpy(indices),)


def killed(indices: Indices) -> tuple[Tensor, ...]:
    if indices[0] == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(indices)


def stopped(indices: Indices) -> tuple[Tensor, ...]:
    if indices[0] == 12:
        os.kill(os.getpid(), signal.SIGSTOP)
    return make(indices)


def taken(function: Callable[[Indices], tuple[Tensor, ...]], limit: float = 600.0) -> Iterator[int]:
    for (indices,) in in_workers(function, PARTS, 1, CPU, limit=limit):
        yield int(indices[0])


# ---- workers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [killed, stopped])
def test_a_lost_or_stopped_worker_ends_the_wait_by_name(
    function: Callable[[Indices], tuple[Tensor, ...]],
) -> None:
    seen: list[int] = []
    with pytest.raises(WorkersFailed) as failed:
        seen += taken(function, limit=2.0 if function is stopped else 60.0)
    assert failed.value.code == 74 and "--data.workers" in str(failed.value)
    assert ("--data.timeout" in str(failed.value)) == (function is stopped)


def test_torch_does_not_raise_in_the_middle_of_a_step() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    batches = taken(make)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("step", [0, 3])
def test_what_is_trained_is_saved_when_images_cannot_be_loaded_any_more(
    step: int, tmp_path: Path
) -> None:
    def break_loader(trainer: Trainer) -> None:
        epoch = trainer.loader.epoch

        def broken(*arguments: int) -> Iterator[object]:
            for done, batch in enumerate(epoch(*arguments)):
                if done == step:
                    raise WorkersFailed("lost")
                yield batch

        trainer.loader.epoch = broken  # type: ignore[assignment, method-assign]

    config = replace(tiny(), log=replace(tiny().log, save_every=100))
    with pytest.raises(WorkersFailed):
        run(tmp_path, config, break_loader)
    assert newest(tmp_path).name == f"step-{step:08d}"


# ---- shared memory ---------------------------------------------------------------------------


def test_a_look_at_the_shared_memory_before_workers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    free = type(shutil.disk_usage("/"))(2**26, 0, 2**26)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    require_shared_memory(2**20, 64, 2)
    with pytest.raises(Unavailable) as refused:
        require_shared_memory(77 * 2**20, 5, 2)
    for named in ("/dev/shm", "--shm-size", "--data.workers 0", "385 MiB", "64 MiB"):
        assert named in str(refused.value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(Unavailable):
        require_shared_memory(2**20, 17, 2)
    require_shared_memory(2**20, 16, 2)


def test_the_batches_that_are_looked_for_are_those_that_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []

    def note(batch: int, ahead: int, _: int) -> None:
        asked.append((batch, ahead))

    monkeypatch.setattr(workers, "require_shared_memory", note)
    list(in_workers(make, PARTS, 1, CPU, row_bytes=100))
    list(in_workers(make, PARTS[:1], 1, CPU, row_bytes=100))
    list(in_workers(make, PARTS, 0, CPU, row_bytes=100))
    assert asked == [(400, 3), (400, 1)]


def test_a_batch_that_finds_no_room_is_an_error_and_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_: Tensor) -> Tensor:
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    with pytest.raises(WorkersFailed) as failed:
        list(taken(make))
    assert "/dev/shm" in str(failed.value) and "--shm-size" in str(failed.value)


def may_mount() -> bool:
    words = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return (
        bool(shutil.which("unshare")) and not subprocess.run(words, capture_output=True).returncode
    )


def images(root: Path) -> list[str]:
    for name in ("train", "test"):
        (root / name / "a").mkdir(parents=True)
        for i in range(40):
            Image.new("RGB", (16, 16), (6 * i, 0, 0)).save(root / name / "a" / f"{i}.png")
    flags = f"--data.name folder --data.root {root} --data.loader torch --data.workers 2"
    return command(f"{flags} --augment.mean 0 0 0 --augment.std 1 1 1 --optim.epochs 1")


BLIND = (
    "import sys; from rdm_fast.data.loaders import workers as w;"
    "w.require_shared_memory = lambda *_: None;"
    "from rdm_fast.cli.commands import train; train()"
)


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="only root may mount a small /dev/shm")
@pytest.mark.parametrize(("blind", "code"), [(False, 69), (True, 74)])
def test_a_small_shared_memory(blind: bool, code: int, tmp_path: Path) -> None:
    """With the look before, and as if another process took the room after it."""
    words = [*images(tmp_path / "data"), "--out", str(tmp_path / "run"), "--augment.size", "96",
             "--optim.global-batch", "32"]  # fmt: skip
    program = ["-c", BLIND] if blind else [str(ROOT / "train.py")]
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm; exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", mount, "bash", sys.executable, *program, *words],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == code and len(errors) == 1, done.stderr
    assert all(named in errors[0] for named in ("/dev/shm", "--shm-size", "--data.workers 0"))
    assert "Traceback" not in done.stderr
