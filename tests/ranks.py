"""Several ranks on one CPU, for tests: gloo processes that meet through a file, not a port."""

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

TIMEOUT = 240.0  # a shared machine may give a rank a tenth of a core


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, tmp_path: Path, timeout: float = TIMEOUT
) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo group; its results, in rank order.

    Args:
        world: number of ranks, each a fresh process with one thread and seed 0.
        function: a function of a module (not a lambda); it asks torch.distributed for its rank.
        args: the same for every rank; must pickle.
        tmp_path: folder for the meeting point and the results.
        timeout: seconds until all ranks are killed.

    Returns:
        What each rank returned: tensors, numbers, strings, and lists, tuples, dicts of them.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the message ends with its
            traceback. The other ranks are stopped.
        TimeoutError: the ranks did not finish in time.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=tmp_path))
    context = mp.spawn(_rank, (world, folder, function, args), nprocs=world, join=False)
    deadline = time.monotonic() + timeout
    while not context.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            for process in context.processes:
                process.kill()
                process.join()
            raise TimeoutError(f"{function.__name__} on {world} ranks took over {timeout:.0f} s")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _rank(
    rank: int, world: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    torch.save(function(*args), folder / f"{rank}.pt")
    dist.destroy_process_group()  # not after an error: ranks left alone would fail first, of that
