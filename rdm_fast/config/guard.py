"""The settings of the collapse guard."""

from dataclasses import dataclass
from typing import Annotated, Literal

from rdm_fast.config.checks import Between, Count, Share, require_fields
from rdm_fast.config.flags import Alias


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """When projections count as collapsed, and how the run responds."""

    mode: Annotated[Literal["warn", "stop", "off"], Alias("--guard")] = "warn"
    """warn prints advice once; stop also saves a checkpoint and exits with code 71."""
    min_rank: Annotated[float, Between(0, 1e6)] = 3.0
    """Effective rank of the projections, in directions, below which they have collapsed; capped at
    a tenth of the directions that the batch can show."""
    min_std: Annotated[float, Between(0, 1e6)] = 0.1
    """Standard deviation of the normalized projections (1 is spread out) below which they have
    collapsed."""
    warmup: Share = 0.05
    """Share of the run's steps, from the first, in which the guard is silent."""
    patience: Count = 3
    """Lines of metrics in a row below a bound before the guard responds."""

    def __post_init__(self) -> None:
        require_fields("guard.", self)
