"""Settings of training on several ranks."""

from dataclasses import dataclass
from typing import Annotated, Literal

from rdm_fast.config.checks import Between, require_fields

Compress = Literal["none", "bf16", "fp16"]
DEFAULT_BUCKET_MB = 25.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How ranks average their gradients; no effect with one rank."""

    bucket_mb: Annotated[float, Between(1e-3, 1e5)] = DEFAULT_BUCKET_MB
    """MiB of gradients in one all-reduce; the default's first is 1 MiB, to start early."""
    compress: Compress = "none"
    """Precision of gradients on the wire: bf16, fp16, or none for uncompressed."""
    static_graph: bool = False
    """Promise DistributedDataParallel that every step is alike; not with optim.accumulate."""
    timeout: Annotated[float, Between(1, 86400)] = 600.0
    """Seconds that a rank waits for the others before it takes one for lost (code 76)."""

    def __post_init__(self) -> None:
        require_fields("parallel.", self)
