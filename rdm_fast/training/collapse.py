"""Collapse guard: detects projections that use hardly any direction, and suggests a remedy.

    complete collapse      all rows alike: their standard deviation falls to 0
    dimensional collapse   rows in few directions: their effective rank falls, std need not
    one prototype          DINO and SwAV: the targets use few prototypes
    uniform targets        and theirs say nothing: every row is spread over all prototypes

The first two bounds apply to the projections, from which both branches are computed. Healthy runs
of every digits recipe stay above 5 directions; collapsing ones end under 2 (docs/telemetry.md).
"""

from collections.abc import Mapping
from math import log

from rdm_fast.config import Config
from rdm_fast.filters.response import advice, trend

SHARE = 0.1
"""Largest bound on the effective rank, as a share of the most that a batch can show."""
UNIFORM = 0.98
"""Entropy of the targets' rows over ln K from which they say nothing."""
STUCK = 0.01
"""Distance of the loss from ln K within which the online output is uniform too."""


class CollapseGuard:
    """Checks every line of metrics, and counts those in a row that violate a bound.

    Attributes:
        low: lines in a row under a bound.
    """

    def __init__(self, config: Config, total_steps: int) -> None:
        self.config = config
        self.low = 0
        self._first_step = config.guard.warmup * total_steps

    @property
    def stops(self) -> bool:
        """Whether a collapse ends the run."""
        return self.config.guard.mode == "stop"

    def check(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A sentence once `guard.patience` lines in a row are under a bound, else None.

        With guard.mode=stop every further line gives one too, so a resumed run stops again.
        """
        if self.config.guard.mode == "off" or step <= self._first_step:
            return None
        found = self._of_projections(metrics) or self._of_targets(metrics)
        self.low = self.low + 1 if found else 0
        patience = self.config.guard.patience
        if found and (self.low == patience or (self.stops and self.low > patience)):
            what, reason = found
            return f"{what} at step {step}, {reason}: {remedy(self.config)}"
        return None

    def state_dict(self) -> dict[str, int]:
        """The count."""
        return {"low": self.low}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state_dict`."""
        self.low = state["low"]

    def _of_projections(self, metrics: Mapping[str, float]) -> tuple[str, str] | None:
        """What has collapsed, and how that shows."""
        bounds, what = self.config.guard, "the projections have collapsed"
        std, rank = metrics["std"], metrics["effective_rank/projection"]
        if std < bounds.min_std:
            bound = f"(std {std:.2g}, under guard.min_std={bounds.min_std:g})"
            return what, f"all rows are nearly alike {bound}"
        share = metrics["effective_rank/share"]
        attainable = rank / share if share > 0 else 0.0
        if rank < min(bounds.min_rank, SHARE * attainable) or rank == 0:
            bound = f"(guard.min_rank={bounds.min_rank:g})"
            return what, f"effective rank {rank:.2g} of at most {attainable:.0f} {bound}"
        return None

    def _of_targets(self, metrics: Mapping[str, float]) -> tuple[str, str] | None:
        """The same of DINO's and SwAV's assignments."""
        if "perplexity/target" not in metrics:
            return None
        used, most = metrics["perplexity/target"], self.config.prototypes.count
        if used < (bound := min(self.config.guard.min_rank, SHARE * most)):
            reason = f"all images have one prototype ({used:.2g} in use, under {bound:g} of {most})"
            return "the targets have collapsed", reason
        soft = metrics["entropy/target"]
        if soft > UNIFORM or abs(metrics["loss"] - log(most)) < STUCK:
            reason = f"they are uniform (entropy {soft:.3f}, loss close to ln K = {log(most):.3f})"
            return "the targets have collapsed", reason
        return None


def remedy(config: Config) -> str:
    """The change that most likely helps, as the end of a sentence."""
    filtered = config.predictor == "spectral"
    if config.method == "symsimsiam":
        return "symsimsiam is the control and should collapse; use simsiam or byol to train"
    if config.method in ("dino", "swav") and not filtered:
        return of_prototypes(config)
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
        return f"the target moves too fast; raise --optim.ema-start ({config.optim.ema_start:g})"
    return (
        "lower --optim.base-lr, and look at two views of an image "
        "(rdm preview): they must show the same thing, differently"
    )


def of_prototypes(config: Config) -> str:
    """The same for DINO and SwAV."""
    how = config.prototypes
    if how.centring == "none":
        return "nothing keeps the prototypes in equal use; use --prototypes.centring sinkhorn"
    if config.method == "dino" and how.warning:
        return "the targets are not sharper than the online branch; lower --prototypes.teacher-temp"
    name = "teacher-temp" if config.method == "dino" else "epsilon"
    return f"lower --prototypes.{name}, or raise --prototypes.frozen-epochs"
