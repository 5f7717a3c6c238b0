"""Ranks: torchrun's process group, and gathers without gradient.

No collective is in the autograd graph. Rows are gathered detached, each rank computes the rows of
the gradient that belong to its own images, and DistributedDataParallel averages the gradients of
the parameters.
"""

import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from rdm_fast.errors import RankLost, Unavailable, UsageError, message_of
from rdm_fast.runtime.launcher import LOOPBACK, Launched, launched
from rdm_fast.runtime.printing import print_line

ROLL_CALL = 1.5
"""Seconds in which ranks that lost another one tell each other that they are still there."""
FAILED = re.compile(r"gloo|nccl|timed? ?out|connection|socket|peer|broken pipe", re.IGNORECASE)
"""In the message of a collective that failed inside autograd, where its type is RuntimeError."""


def world_size() -> int:
    """Number of ranks; 1 outside torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 outside torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def print0(*lines: str) -> None:
    """Print on rank zero only, at once."""
    if rank() == 0:
        print_line(*lines)


def choose_device(asked: str) -> torch.device:
    """The device of this rank.

    Raises:
        Unavailable: cuda was requested and this rank has no GPU.
    """
    here = launched()
    local = here.local_rank or 0
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and count == 0):
        return torch.device("cpu")
    if here.local_rank is None and here.world_size > 1:
        raise UsageError(
            "LOCAL_RANK is not set, so this rank does not know its GPU: start with torchrun or "
            "--nproc, or give --device cpu"
        )
    if here.launcher == "srun" and count == 1:  # of all GPUs SLURM shows a task only its own
        local = 0
    if local >= count:
        raise Unavailable(
            f"--device {asked}: this is local rank {local} and there are {count} GPU(s): use "
            "--device cpu, or start at most one rank a GPU"
        )
    return torch.device("cuda", local)


def start(device: torch.device, timeout: float) -> None:
    """Join the launcher's process group, if there is one: NCCL on GPUs, gloo on CPUs.

    Args:
        device: this rank's.
        timeout: seconds that a rank waits for the others, here and in each collective.

    Raises:
        RankLost: not all ranks came.
        UsageError: MASTER_ADDR is no host, or MASTER_PORT is in use.
    """
    here = launched()
    if here.world_size == 1:
        return
    backend, own_device = "gloo", None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, own_device = "nccl", device
    wait = timedelta(seconds=timeout)
    store = method = None  # from torchrun's variables
    if here.store:
        store = dist.FileStore(here.store, here.world_size)  # type: ignore[attr-defined]
        store.set_timeout(wait)
    else:
        _require_host(here)
    if here.launcher == "srun":
        method = f"tcp://{here.address}:{here.port}"
    try:
        dist.init_process_group(
            backend, init_method=method, timeout=wait, device_id=own_device, store=store,
            rank=here.rank, world_size=here.world_size,
        )  # fmt: skip
    except RuntimeError as error:  # the base of DistError, and all that gloo raises
        if "EADDRINUSE" in str(error):
            raise UsageError(
                f"MASTER_PORT={here.port} of {here.address} is in use: give another, or leave it "
                "out and let the launcher choose"
            ) from error
        raise RankLost(
            f"rank {here.rank} waited for the other {here.world_size - 1} rank(s) to start, and "
            f"not all came within --parallel.timeout {timeout:g} s ({message_of(error)[:200]}): "
            "see why, then run the same command again"
        ) from error


def _require_host(here: Launched) -> None:
    """Check at once that the address of rank 0 is one; torch tries until its time is up."""
    if here.address == LOOPBACK and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    try:
        socket.getaddrinfo(here.address, here.port)
    except OSError as error:
        raise UsageError(
            f"MASTER_ADDR={here.address} is not a known host ({error.strerror}): give the address "
            "of rank 0"
        ) from error


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def raise_rank_lost() -> Iterator[None]:
    """Convert collective failures from dead or hung ranks into RankLost.

    Raises:
        RankLost: in place of torch's error; it names the collective, and the ranks that are silent.
    """
    try:
        yield
    except RuntimeError as error:
        if (collective := _collective(error)) is None:
            raise
        silent = _silent_ranks()
        lost = f"rank {', '.join(map(str, silent))}" if silent else "another rank"
        raise RankLost(
            f"rank {rank()} lost {lost} in {collective}, which died or hung "
            f"(--parallel.timeout): see logs/rank*.err in the run folder, then run the same "
            "command again to continue from the last checkpoint"
        ) from error


def _collective(error: RuntimeError) -> str | None:
    """The collective in which an error arose, by its class or where it was raised; None if none.

    gloo has no class of its own. Gradients are averaged inside autograd, without a Python frame.
    """
    frames = traceback.extract_tb(error.__traceback__)
    of_torch = [f.name for f in frames if f.filename.endswith("distributed_c10d.py")]
    if of_torch:
        return of_torch[0]
    text = str(error)
    averaging = world_size() > 1 and any("torch" in f.filename for f in frames[-1:])
    if isinstance(error, dist.DistError) or (averaging and FAILED.search(text)):
        return "the all_reduce of the gradients" if averaging else "a collective"
    return None


def _silent_ranks() -> list[int]:
    """The ranks that do not say within ROLL_CALL seconds that they lost another one, too."""
    answered = {rank()}

    def call() -> None:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"lost another/{rank()}", "")
        until = time.monotonic() + ROLL_CALL
        while time.monotonic() < until and len(answered) < world_size():
            for other in set(range(world_size())) - answered:
                if store.check([f"lost another/{other}"]):
                    answered.add(other)
            time.sleep(0.05)

    def safely() -> None:
        with suppress(RuntimeError, ValueError):  # the store may be that of the lost rank
            call()

    thread = threading.Thread(target=safely, daemon=True)
    thread.start()
    thread.join(2 * ROLL_CALL)
    return sorted(set(range(world_size())) - answered)


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows, in rank order, without gradient.

    Args:
        rows: [v, b, D], the same shape on every rank; sent in their own dtype.

    Returns:
        [v, R * b, D]; row r * b + i of each view is row i of rank r.
    """
    rows = rows.detach()
    if world_size() == 1:
        return rows
    v, b, D = rows.shape
    gathered = rows.new_empty(world_size() * v, b, D)
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered.view(-1, v, b, D).transpose(0, 1).reshape(v, -1, D)


def local_rows(local: int) -> slice:
    """This rank's rows in a gathered matrix."""
    return slice(rank() * local, (rank() + 1) * local)


def all_reduce_max(value: int, device: torch.device) -> int:
    """The maximum over ranks; waits for the device."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)
