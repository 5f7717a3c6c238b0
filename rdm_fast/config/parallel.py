"""Settings of training on several ranks, and how many ranks there are."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from rdm_fast.config.checks import Between, require, require_fields
from rdm_fast.config.optim import OptimConfig

Compress = Literal["none", "bf16", "fp16"]
DEFAULT_BUCKET_MB = 25.0
MOST_RANKS = 1024
"""On one machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How ranks average their gradients; no effect with one rank."""

    bucket_mb: Annotated[float, Between(1e-3, 1e5)] = DEFAULT_BUCKET_MB
    """MiB of gradients in one all-reduce; the default's first is 1 MiB, to start early."""
    compress: Compress = "none"
    """Precision of gradients on the wire: bf16, fp16, or none for uncompressed."""
    static_graph: bool = False
    """Promise DistributedDataParallel that every step is alike; not with optim.accumulate."""

    def __post_init__(self) -> None:
        require_fields("parallel.", self)


def world_size() -> int:
    """Number of ranks that a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_nproc(nproc: str) -> None:
    """Validate --nproc.

    Raises:
        UsageError: it is not a number of ranks, gpu or auto; or this process is itself a rank.
    """
    require(
        nproc in ("gpu", "auto")
        or (nproc.isascii() and nproc.isdigit() and 0 < int(nproc[:9]) <= MOST_RANKS),
        f"nproc={nproc} is not a number of ranks: give 1 to {MOST_RANKS}, gpu, or auto",
    )
    require(
        nproc == "1" or "RANK" not in os.environ,
        f"nproc={nproc} starts ranks, but torchrun or another launcher already has: leave out "
        "--nproc, or start without the launcher",
    )


def check_ranks(optim: OptimConfig, nproc: str) -> None:
    """Check that the global batch divides over the ranks, running or about to start.

    The number behind `gpu` and `auto` is known only once torch is imported, so they pass.

    Raises:
        UsageError: it does not divide.
    """
    if nproc not in ("gpu", "auto"):
        optim.local_batch(int(os.environ.get("WORLD_SIZE", nproc)))
