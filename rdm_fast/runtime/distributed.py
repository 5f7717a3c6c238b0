"""Ranks: torchrun's process group, and gathers without gradient.

No collective is in the autograd graph. Rows are gathered detached, each rank computes the rows of
the gradient that belong to its own images, and DistributedDataParallel averages the gradients of
the parameters.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from rdm_fast.errors import RankLost, Unavailable
from rdm_fast.runtime.printing import print_line

TIMEOUT = timedelta(minutes=10)
STORE = "RDM_FAST_STORE"
"""Environment variable: the folder where ranks of one machine meet, instead of at a port."""


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
    local = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and count == 0):
        return torch.device("cpu")
    if local >= count:
        raise Unavailable(
            f"--device {asked}: this is local rank {local} and there are {count} GPU(s): use "
            "--device cpu, or start at most one rank a GPU"
        )
    return torch.device("cuda", local)


def start(device: torch.device) -> None:
    """Join the launcher's process group, if there is one: NCCL on GPUs, gloo on CPUs."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    backend, own_device = "gloo", None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, own_device = "nccl", device
    store, number, world = None, -1, -1  # from torchrun's variables
    if folder := os.environ.get(STORE):
        number, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        start = os.environ["TORCHELASTIC_RESTART_COUNT"]
        store = dist.FileStore(f"{folder}/ranks-{start}", world)  # type: ignore[attr-defined]
    dist.init_process_group(
        backend, timeout=TIMEOUT, device_id=own_device, store=store, rank=number, world_size=world
    )


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def raise_rank_lost() -> Iterator[None]:
    """Convert collective failures from dead or hung ranks into RankLost.

    Raises:
        RankLost: in place of torch's error; gloo has no exception class of its own.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RankLost(
                f"rank {rank()} lost another rank, which died or hung: see logs/rank*.err in the "
                "run folder, then run the same command again to continue from the last checkpoint"
            ) from error
        raise


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
