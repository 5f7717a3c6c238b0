"""The settings of the collapse guard."""

import math
from dataclasses import dataclass
from typing import Literal

from rdm_fast.config.checks import require, require_choices, require_probability


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What is done when projections collapse."""

    mode: Literal["warn", "stop", "off"] = "warn"
    """warn says so once, with advice; stop also saves a checkpoint and ends with exit code 71."""
    min_rank: float = 3.0
    """Effective rank of the projections, in directions, under which they have collapsed; never more
    than a tenth of the directions that the batch can show."""
    min_std: float = 0.1
    """Standard deviation of the normalized projections (1 is spread out) under which all are
    alike."""
    warmup: float = 0.05
    """Share of the run's steps, from the first, in which nothing is said."""
    patience: int = 3
    """Lines of metrics in a row under a bound before anything is said."""

    def __post_init__(self) -> None:
        require_choices("guard.", self)
        for name in ("min_rank", "min_std"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value >= 0,
                f"guard.{name}={value}: give a number of 0 (never) or more",
            )
        require_probability("guard.warmup", self.warmup)
        require(self.patience >= 1, f"guard.patience={self.patience}: give 1 or more lines")
