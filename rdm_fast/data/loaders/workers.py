"""Worker processes that make batches ahead of the loop: torch's DataLoader, which cannot hang here.

Batches come back through the shared memory of the machine. Where it is too small, in a container
with docker's default for one, a worker cannot hand its batch over, and torch would wait for ever.
"""

import gc
import multiprocessing
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from rdm_fast.data.loaders.batch import Indices
from rdm_fast.errors import Unavailable, UserError, WorkersFailed, message_of
from rdm_fast.runtime.launcher import ranks_here
from rdm_fast.runtime.signals import seconds_since_stop

FIRST_CHOICE = "fork" if sys.platform == "linux" else "spawn"
"""How worker processes start, whatever the default of this version of Python."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
AHEAD = 2
"""Batches that each worker makes ahead."""
POLL, LAST = 0.1, 5.0
"""Seconds between two looks for a signal, and those that a batch has after one."""
RAISED = "in DataLoader worker process"
"""In torch's text of an exception that a worker has raised: it lives."""
Made = tuple[Tensor, ...] | UserError
"""A batch from a worker, or its error: as a value it keeps its message, while torch would bury an
exception in a traceback."""


def in_workers(
    make: Callable[[Indices], tuple[Tensor, ...]],
    parts: list[Indices],
    workers: int,
    device: torch.device,
    *,
    row_bytes: int = 0,
    limit: float = 600.0,
) -> Iterator[tuple[Tensor, ...]]:
    """make(part) of each part in turn, computed ahead in worker processes (here if there are none).

    Args:
        make: called with each part.
        parts: indices of images.
        workers: number of processes.
        device: batches for a GPU are put into pinned memory.
        row_bytes: size of what `make` returns for one image.
        limit: seconds to wait for a batch.

    Raises:
        UserError: `make` raised it; without a worker's traceback.
        Unavailable: the shared memory has no room for the batches.
        WorkersFailed: a worker was killed, hangs, or found no room in the shared memory.
    """
    # fork is quick and copies no million paths; a program that has chosen another way keeps it.
    start = multiprocessing.get_start_method(allow_none=True) or FIRST_CHOICE
    if workers and parts:
        gc.collect()  # a forked worker that collects a DALI pipeline waits for threads it lacks
        ahead = min(len(parts), AHEAD * workers + 1)
        require_shared_memory(max(map(len, parts)) * row_bytes, ahead, workers)
    loader: DataLoader[Made] = DataLoader(
        _Parts(make, parts),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=multiprocessing.get_context(start) if workers else None,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else every epoch would draw from the global generator
    )
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    batches = iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)  # torch's handler raises in the middle of a step
    for made in _within(limit, batches) if workers else batches:
        if isinstance(made, UserError):
            raise made
        yield made


def no_more_images(rank: int) -> WorkersFailed:
    """The error of the other ranks when one can load no more images."""
    return WorkersFailed(
        f"rank {rank} can load no more images: logs/rank{rank}.err in the run folder says why; "
        "then run the same command again"
    )


def require_shared_memory(batch: int, ahead: int, workers: int) -> None:
    """Refuse workers whose batches would not fit into what is free of the shared memory.

    Args:
        batch: bytes.
        ahead: batches that exist at a time.
        workers: their number, for the message.

    Raises:
        Unavailable: they do not fit.
    """
    with suppress(OSError):  # no such folder: this system shares its memory in another way
        free = shutil.disk_usage(SHARED_MEMORY).free
        needed = batch * ahead * ranks_here()
        if needed > free:
            raise Unavailable(
                f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, and the batches of "
                f"--data.workers {workers} need {needed / 2**20:.0f} MiB of it: {_more_of_it()}"
            )


def _more_of_it() -> str:
    return (
        "start the container with --shm-size 8g (docker) or --ipc=host, or give fewer workers; "
        "--data.workers 0 needs none"
    )


def _within(limit: float, batches: Iterator[Made]) -> Iterator[Made]:
    """The batches, each waited for in a thread: torch waits without a limit for a stopped worker.

    Raises:
        WorkersFailed: a worker was lost, or a batch took longer than `limit` seconds.
    """
    waiting = ThreadPoolExecutor(1)
    try:
        while (made := _soon(waiting.submit(next, batches, None), limit)) is not None:
            yield made
    except (RuntimeError, OSError, EOFError) as error:
        text = message_of(error)
        if not isinstance(error, OSError | EOFError) and "DataLoader worker" not in text:
            raise
        if RAISED in text:
            raise
        late = isinstance(error, TimeoutError) and not error.args
        why = f"no worker has made a batch in {limit:g} s (--data.timeout)" if late else text
        for worker in getattr(batches, "_workers", ()):
            worker.kill()  # a stopped process would not end otherwise, nor would this one
        raise WorkersFailed(
            f"{why}: if memory ran out, give fewer --data.workers; then run the same command again"
        ) from error
    finally:
        waiting.shutdown(wait=False)


def _soon(batch: "Future[Made | None]", limit: float) -> Made | None:
    """The batch, unless it takes too long: LAST seconds for a run that a signal asked to stop.

    Raises:
        TimeoutError: it does.
    """
    began = time.monotonic()
    while not wait([batch], POLL).done:
        waited = time.monotonic() - began
        if waited > limit or min(waited, seconds_since_stop()) > LAST:
            raise TimeoutError
    return batch.result()


class _Parts(Dataset[Made]):
    def __init__(self, make: Callable[[Indices], tuple[Tensor, ...]], parts: list[Indices]) -> None:
        self.make, self.parts = make, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, part: int) -> Made:
        try:
            made = self.make(self.parts[part])
        except UserError as error:
            return error
        if get_worker_info() is None:
            return made
        try:  # here, where it can be reported; torch would do it in a thread, and lose the batch
            return tuple(tensor.share_memory_() for tensor in made)
        except (RuntimeError, OSError) as error:
            return WorkersFailed(
                f"a data worker found no room in {SHARED_MEMORY} ({message_of(error)}): "
                f"{_more_of_it()}"
            )
