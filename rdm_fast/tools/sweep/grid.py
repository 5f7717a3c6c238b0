"""Names of filters, and what a recipe becomes with each.

    online_s1  online_s2  online_log  online_log_1  online_log_2    rising g, on the online branch
    target_s-1  target_s-0.7  target_s-0.5  target_s-0.3            falling g, on the target
    control                                                         nothing is filtered

That is the grid of the RDM paper (arXiv:2303.02387, CIFAR-10). Any other exponent can be named in
the same way. The control is poly with sigma 0: it differs from the other runs in the filter alone,
where the paper's SymSimSiam also centers and has no stop-gradient; `symsimsiam` names that one.
"""

import re
from dataclasses import replace
from typing import Any

from rdm_fast.config import Config, FilterConfig

GRID = (
    *("online_s1", "online_s2", "online_log", "online_log_1", "online_log_2"),
    *("target_s-1", "target_s-0.7", "target_s-0.5", "target_s-0.3"),
    "control",
)
CONTROL = "control"
SYMMETRIC = "symsimsiam"
VARIED = ("--predictor", "--filter.kind", "--filter.location", "--filter.sigma")
"""Flags whose values the names stand for."""

_NAME = re.compile(r"(online|target)_(?:s(-?\d+(?:\.\d+)?)|(log|log_1|log_2))")


def require_name(name: str) -> None:
    """Make sure that a filter can be meant.

    Raises:
        ValueError: it cannot.
    """
    if name not in (CONTROL, SYMMETRIC) and not _NAME.fullmatch(name):
        raise ValueError(
            f"--filter {name} is not a filter: name the branch and g, such as online_s1, "
            f"online_log_1 or target_s-0.5, or {CONTROL}"
        )


def configure(config: Config, name: str) -> Config:
    """A recipe with the filter of that name, writing to a folder of that name under `out`.

    Args:
        config: of SimSiam or BYOL; what it says of kind, location and sigma is replaced.
        name: as `require_name` accepts it.

    Raises:
        ValueError: the filter cannot have the other settings of `config.filter`.
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
    return replace(config, predictor="spectral", filter=spectral, out=out)


def prediction(config: Config) -> str:
    """What RDM predicts of the rank difference: positive, negative or zero."""
    spectral = config.filter
    if config.predictor != "spectral" or (spectral.kind == "poly" and spectral.sigma == 0):
        return "zero"
    wanted = spectral.is_falling == (spectral.location == "target")
    return "positive" if wanted else "negative"
