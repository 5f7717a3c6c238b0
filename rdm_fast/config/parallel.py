"""Settings of training on several ranks; with one rank they have no effect."""

import math
import os
from dataclasses import dataclass
from typing import Literal

from rdm_fast.config.checks import require, require_choices

Compress = Literal["none", "bf16", "fp16"]
DEFAULT_BUCKET_MB = 25.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How ranks average their gradients."""

    bucket_mb: float = DEFAULT_BUCKET_MB
    """MiB of gradients in one all-reduce; the default's first is 1 MiB, to start early."""
    compress: Compress = "none"
    """Send gradients in 16 bits: bf16, or fp16; none sends them as they are, exactly."""
    static_graph: bool = False
    """Tell DistributedDataParallel that every step is alike; not with optim.accumulate."""

    def __post_init__(self) -> None:
        require_choices("parallel.", self)
        require(
            math.isfinite(self.bucket_mb) and self.bucket_mb > 0,
            f"parallel.bucket_mb={self.bucket_mb}: give a size in MiB above 0, such as "
            f"{DEFAULT_BUCKET_MB:g}",
        )


def check_nproc(nproc: str) -> None:
    """Raise ValueError unless this number of ranks, as --nproc names it, can be started."""
    if nproc not in ("gpu", "auto") and not (nproc.isascii() and nproc.isdigit() and int(nproc)):
        raise ValueError(f"nproc={nproc} is no number of ranks: give 1 or more, gpu, or auto")
    if nproc != "1" and "RANK" in os.environ:
        raise ValueError(
            f"nproc={nproc} starts ranks, and this is one that torchrun or another launcher has "
            "started: leave out --nproc, or start without the launcher"
        )
