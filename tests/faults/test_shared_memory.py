"""A run never waits for ever for its images: a lost or stopped worker ends it in one line."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from rdm_fast import __main__ as entries
from rdm_fast.config import AugmentConfig, DataConfig
from rdm_fast.data import build_loader, load
from rdm_fast.data.loaders import evaluation, torch_loader, workers
from rdm_fast.data.loaders.batch import Indices
from rdm_fast.data.loaders.evaluation import _CenterViews
from rdm_fast.data.loaders.workers import in_workers, require_shared_memory
from rdm_fast.errors import Unavailable, WorkersFailed
from rdm_fast.evaluation import features
from rdm_fast.runtime.distributed import rank
from rdm_fast.training.trainer import Trainer
from tests.data.files import good_images
from tests.forks import PATIENCE, ROOT, Forked, environment
from tests.random_run import save_random
from tests.ranks import run_ranks
from tests.runs import CPU, final_state, newest, run, with_log
from tests.tiny import command, tiny, with_small_views

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
    for worker in multiprocessing.active_children():  # Python would wait for them at its end
        worker.join(PATIENCE)
        assert worker.exitcode is not None


def test_torch_does_not_raise_in_the_middle_of_a_step() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    batches = taken(make)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before
    batches.close()  # type: ignore[attr-defined]


def lose_images(trainer: Trainer, step: int) -> None:
    """Let the loader fail where it should give the batch of this step, from 0."""
    epoch = trainer.loader.epoch

    def broken(*arguments: int) -> Iterator[object]:
        for batch in epoch(*arguments):
            if trainer.step == step:
                raise WorkersFailed("lost")
            yield batch

    trainer.loader.epoch = broken  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize("step", [0, 3])
def test_what_is_trained_is_saved_when_images_cannot_be_loaded_any_more(
    step: int, tmp_path: Path
) -> None:
    with pytest.raises(WorkersFailed):
        run(tmp_path, with_log(tiny(), save_every=100), partial(lose_images, step=step))
    assert newest(tmp_path).name == f"step-{step:08d}"


LOST = [(1, 2, 100), (0, 7, 1)]
"""The rank, its step, and how often a step is logged."""


def lost_and_resumed(folder: Path) -> list[str]:
    """What this rank says when one of two ranks can load no more images, time after time."""
    said = []
    run(folder / "undisturbed", tiny())
    for which, step, every in LOST:
        config = with_log(tiny(), save_every=100, every=every, spectrum_every=0)

        def prepare(trainer: Trainer, which: int = which, step: int = step) -> None:
            if rank() == which:
                lose_images(trainer, step)

        out = folder / f"{which}-{step}"
        try:
            run(out, config, prepare)
        except WorkersFailed as error:
            said.append(str(error))
        dist.barrier()
        assert newest(out).name == f"step-{step:08d}"
        run(out, config)
    return said


def test_ranks_save_together_when_one_can_load_no_more_images(tmp_path: Path) -> None:
    said = run_ranks(2, lost_and_resumed, tmp_path, tmp_path=tmp_path)
    for number, (which, step, _) in enumerate(LOST):
        assert said[which][number] == "lost"
        assert f"rank {which}" in said[1 - which][number]
        assert final_state(tmp_path / f"{which}-{step}") == final_state(tmp_path / "undisturbed")


def embedded(folder: Path) -> str:
    """What this rank says when rank 1 loses its images while both embed, and then save."""

    def lose(trainer: Trainer) -> None:
        def batches(*_: object, **__: object) -> Iterator[tuple[Tensor, Tensor]]:
            if rank() == 1:
                raise WorkersFailed("lost")
            yield torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)

        features.evaluation_batches = batches

    try:
        run(folder, with_log(tiny(), save_every=100, knn_every=1), lose)
    except WorkersFailed as error:
        return str(error)
    return "nothing"


def test_ranks_save_together_when_one_can_load_no_more_test_images(tmp_path: Path) -> None:
    said = run_ranks(2, embedded, tmp_path / "run", tmp_path=tmp_path)
    assert "rank 1" in said[0] and said[1] == "lost"
    assert newest(tmp_path / "run").name == "step-00000000"


def evaluates_without_its_worker(words: Sequence[str]) -> None:
    """An evaluation whose data worker is killed, as by a system without memory."""
    multiprocessing.set_start_method("fork", force=True)  # a worker that inherits this
    _CenterViews.__call__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment, return-value]
    sys.argv = ["eval_linear.py", *words]
    entries.evaluate()


def test_an_evaluation_that_loses_its_worker_is_one_line(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for i in range(4):
            (tmp_path / "data" / split / f"{i % 2}").mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (16, 16), (9 * i, 0, 0))
            picture.save(tmp_path / "data" / split / f"{i % 2}" / f"{i}.png")
    data = DataConfig(name="folder", root=str(tmp_path / "data"), workers=0)
    save_random(tmp_path / "run", replace(tiny(), data=data, augment=AugmentConfig(size=8)))
    out = tmp_path / "out"
    words = [str(tmp_path / "run"), "--data.workers", "1"]
    process = Forked(evaluates_without_its_worker, words, out=out, cwd=tmp_path)
    assert process.wait() == 74, out.read_text()
    lines = out.read_text().splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1 and "--data.workers" in errors[0] and "Traceback" not in out.read_text()


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


def test_training_and_evaluation_say_how_large_their_batches_are_and_how_long_they_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[int, int, float]] = []

    def note(
        make: Callable[[Indices], tuple[Tensor, ...]], parts: list[Indices], *_: object,
        row_bytes: int, limit: float,
    ) -> Iterator[tuple[Tensor, ...]]:  # fmt: skip
        for part in parts:
            made = make(part)
            size = sum(tensor.nbytes for tensor in made if tensor.dtype == torch.uint8)
            asked.append((size, row_bytes * len(part), limit))
            yield made

    for loader in (torch_loader, evaluation):
        monkeypatch.setattr(loader, "in_workers", note)
    data = DataConfig(
        name="folder", root=str(good_images(tmp_path)), loader="torch", workers=0, timeout=7.0
    )
    config = replace(with_small_views("digits_byol", global_batch=4), data=data)
    config = replace(config, augment=replace(config.augment, mean=(0.5,) * 3, std=(0.5,) * 3))
    read = load(data, "train")
    list(build_loader(config, read, rank=0, world_size=1, device=CPU).epoch(0))
    trained = len(asked)
    features.embed(torch.nn.Flatten(), read, config, CPU, batch=3)
    assert trained == 2 and len(asked) == 5
    assert [needed for _, needed, _ in asked] == [size for size, _, _ in asked]
    assert {limit for _, _, limit in asked} == {7.0}


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
