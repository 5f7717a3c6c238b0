"""Several ranks on one CPU, for tests: gloo processes that meet through a file, not a port."""

import faulthandler
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests import forks

TIMEOUT = 240.0  # a shared machine may give a rank a tenth of a core


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, tmp_path: Path, timeout: float = TIMEOUT
) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo group; its results, in rank order.

    Args:
        world: number of ranks, each a fresh process with one thread and seed 0. It is forked from
            a server that has torch and rdm_fast imported (tests.forks), so it costs milliseconds.
        function: a function of a module (not a lambda); it asks torch.distributed for its rank.
        args: the same for every rank; must pickle.
        tmp_path: folder for the meeting point and the results.
        timeout: seconds until all ranks are killed.

    Returns:
        What each rank returned: tensors, numbers, strings, and lists, tuples, dicts of them.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the message ends with its
            traceback. The other ranks are stopped.
        RankDied: a signal ended a rank; the message has where each of its threads was.
        TimeoutError: the ranks did not finish in time.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=tmp_path))
    forks.start_server()
    context = mp.start_processes(
        _rank, (world, folder, dict(os.environ), function, args), nprocs=world, join=False,
        start_method="forkserver",
    )  # fmt: skip
    deadline = time.monotonic() + timeout
    while not _joined(context, deadline, folder):
        if time.monotonic() >= deadline:
            for process in context.processes:
                process.kill()
                process.join()
            raise TimeoutError(f"{function.__name__} on {world} ranks took over {timeout:.0f} s")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


class RankDied(Exception):
    """A signal ended a rank."""


def _joined(context: mp.ProcessContext, deadline: float, folder: Path) -> bool:
    try:
        return context.join(timeout=max(0.0, deadline - time.monotonic()))
    except mp.ProcessExitedException as error:
        stack = (folder / f"{error.error_index}.stack").read_text()
        raise RankDied(f"{error}\n{stack}") from None


def _rank(
    rank: int,
    world: int,
    folder: Path,
    variables: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    forks.enter()
    os.environ.update(variables)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    torch.manual_seed(0)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    with (folder / f"{rank}.stack").open("w") as stack:
        faulthandler.enable(stack)
        torch.save(function(*args), folder / f"{rank}.pt")
        _leave(store, world)


def _leave(store: dist.Store, world: int) -> None:
    """End this process once every rank has its result, and skip all teardown.

    Destroying a gloo group, and ending the interpreter under its threads, are races that can
    abort a process whose work is done. What is asked of the ranks is their results.
    """
    store.set(f"done {dist.get_rank()}", "")
    store.wait([f"done {rank}" for rank in range(world)], timedelta(seconds=TIMEOUT))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
