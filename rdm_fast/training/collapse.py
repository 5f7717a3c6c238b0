"""The collapse guard: notices that projections use hardly any direction, and says what helps.

    complete collapse      all rows alike: their standard deviation falls to 0
    dimensional collapse   rows in few directions: their effective rank falls, std need not

Bounds are on the projections, which both branches are made of. Healthy runs of every digits recipe
stay above 5 directions, and those that collapse end under 2 (docs/telemetry.md).
"""

from collections.abc import Mapping

from rdm_fast.config import Config
from rdm_fast.filters.response import advice, trend

SHARE = 0.1
"""The bound on the effective rank is at most this share of what the batch can show."""


class CollapseGuard:
    """Looks at every line of metrics; remembers how long they have been under a bound.

    Attributes:
        low: lines in a row under a bound, which a checkpoint keeps.
    """

    def __init__(self, config: Config, total_steps: int) -> None:
        self.config = config
        self.low = 0
        self._first_step = config.guard.warmup * total_steps

    @property
    def stops(self) -> bool:
        """Whether a collapse ends the run."""
        return self.config.guard.mode == "stop"

    def look(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """One sentence if these metrics make a collapse certain, once for each; else None.

        A guard that stops also says it of every later line, should the run be resumed as it is.
        """
        if self.config.guard.mode == "off" or step <= self._first_step:
            return None
        reason = self._reason(metrics)
        self.low = self.low + 1 if reason else 0
        patience = self.config.guard.patience
        if self.low == patience or (self.stops and self.low > patience):
            return f"the projections have collapsed at step {step}, {reason}: {remedy(self.config)}"
        return None

    def _reason(self, metrics: Mapping[str, float]) -> str | None:
        bounds = self.config.guard
        std, rank = metrics["std"], metrics["effective_rank/projection"]
        if std < bounds.min_std:
            return (
                f"all rows are nearly alike (std {std:.2g}, under guard.min_std={bounds.min_std:g})"
            )
        share = metrics["effective_rank/share"]
        attainable = rank / share if share > 0 else 0.0
        if rank < min(bounds.min_rank, SHARE * attainable) or rank == 0:
            return (
                f"effective rank {rank:.2g} of at most {attainable:.0f} "
                f"(guard.min_rank={bounds.min_rank:g})"
            )
        return None


def remedy(config: Config) -> str:
    """What to change, most likely cause first; ends the sentence."""
    filtered = config.predictor == "spectral"
    if config.method == "symsimsiam":
        return "symsimsiam is the control that RDM expects to; use simsiam or byol to train"
    if filtered and trend(config.filter) == "flat":
        return "filter.sigma=0 filters nothing; use --filter.location target --filter.sigma -1"
    if filtered and (text := advice(config.filter)):
        return text.removesuffix(".")
    if filtered and config.filter.location == "online":
        return (
            "this filter does not keep the ranks apart; use --filter.location target "
            "--filter.sigma -1, or lower --optim.base-lr"
        )
    if config.method == "byol" and config.optim.ema_start < 0.9:
        return f"the target follows at once; raise --optim.ema-start ({config.optim.ema_start:g})"
    return (
        "lower --optim.base-lr, and look at two views of an image "
        "(rdm preview): they must show the same thing, differently"
    )
