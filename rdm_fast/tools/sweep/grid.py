"""Names of filters, and the configuration that each makes of a recipe.

    online_s1  online_s2  online_log  online_log_1  online_log_2    rising g, on the online branch
    target_s-1  target_s-0.7  target_s-0.5  target_s-0.3            falling g, on the target
    control                                                         nothing is filtered

This is the grid of the RDM paper (arXiv:2303.02387, CIFAR-10). Other exponents are named the same
way. The control is poly with sigma 0, so it differs from the other runs in the filter alone. The
paper's SymSimSiam also centers and has no stop-gradient; its name here is `symsimsiam`.
"""

import re
from dataclasses import replace
from typing import Any

from rdm_fast.config import Config, FilterConfig
from rdm_fast.config.checks import require
from rdm_fast.config.prototypes import TEACHER

GRID = (
    *("online_s1", "online_s2", "online_log", "online_log_1", "online_log_2"),
    *("target_s-1", "target_s-0.7", "target_s-0.5", "target_s-0.3"),
    "control",
)
CONTROL = "control"
SYMMETRIC = "symsimsiam"

_NAME = re.compile(r"(online|target)_(?:s(-?\d+(?:\.\d+)?)|(log|log_1|log_2))")


def require_name(name: str) -> None:
    """Check the name of a filter.

    Raises:
        UsageError: it names no filter.
    """
    require(
        name in (CONTROL, SYMMETRIC) or _NAME.fullmatch(name) is not None,
        f"--filter {name} is not a filter: name the branch and g, such as online_s1, "
        f"online_log_1 or target_s-0.5, or {CONTROL}",
    )


def configure(config: Config, name: str) -> Config:
    """The configuration with this filter, in a run folder of the same name under `out`.

    Args:
        config: kind, location and sigma of its filter are replaced. The filter also takes the place
            of DINO's center and sharper targets, and of SwAV's Sinkhorn.
        name: a name that `require_name` accepts.

    Raises:
        UsageError: the filter contradicts the other settings of `config.filter`.
    """
    out = f"{config.out}/{name}"
    if name == SYMMETRIC:
        return replace(config, method="symsimsiam", predictor="none", out=out)
    if name == CONTROL:
        spectral = replace(config.filter, kind="poly", location="target", sigma=0.0)
    else:
        match = _NAME.fullmatch(name)
        assert match is not None
        location, sigma, kind = match.groups()
        settings: dict[str, Any] = {"location": location, "kind": kind or "poly"}
        settings["sigma"] = float(sigma or FilterConfig().sigma)
        if location == "online":
            settings["basis"] = "own"
        spectral = replace(config.filter, **settings)
    how = config.prototypes
    if config.method in ("dino", "swav"):  # the filter is all that differs between the branches
        keys = TEACHER[:2] if config.method == "dino" else ("epsilon",)
        same: dict[str, Any] = dict.fromkeys(keys, how.temperature)
        how = replace(how, centring="none", queue=0, queue_epoch=0.0, **same)
    return replace(config, predictor="spectral", filter=spectral, prototypes=how, out=out)


def prediction(config: Config) -> str:
    """The sign of the rank difference that RDM predicts: positive, negative or zero."""
    spectral = config.filter
    heuristic = config.method in ("dino", "swav") and config.predictor == "none"
    if config.predictor == "mlp" or heuristic:
        return "positive"
    if config.predictor != "spectral" or (spectral.kind == "poly" and spectral.sigma == 0):
        return "zero"
    wanted = spectral.is_falling == (spectral.location == "target")
    return "positive" if wanted else "negative"
