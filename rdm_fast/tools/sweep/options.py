"""Options of `rdm sweep`. Nothing here imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Self

import tyro

from rdm_fast.config import Config
from rdm_fast.config.checks import Between, require, require_fields
from rdm_fast.config.recipes import recipe
from rdm_fast.runtime.launcher import require_one_process
from rdm_fast.tools.sweep.grid import GRID, configure, require_name

VARIED = (
    *("--predictor", "--filter.kind", "--filter.location", "--filter.sigma"),
    *("--pred-type", "--pred-location", "--sigma"),
)
"""Flags that a filter's name sets."""


@dataclass(frozen=True, kw_only=True)
class SweepCommand:
    """Options of `rdm sweep`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    filter: tuple[str, ...] = GRID
    """Filters, one run each: branch and g, such as online_s1, online_log_1 or target_s-0.5; control
    filters nothing, symsimsiam is the paper's symmetric control."""
    jobs: Annotated[int, Between(0, 1024)] = 0
    """Runs at a time; 0 for one per GPU, or one per core on a CPU, which then share its threads."""
    overwrite: bool = False
    """Delete the runs in the sweep's folder and start all of them again."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        require_fields("--", self)
        require(bool(self.filter), "--filter needs the name of one filter or more")
        for name in self.filter:
            require_name(name)
        twice = sorted({name for name in self.filter if self.filter.count(name) > 1})
        require(not twice, f"--filter lists {', '.join(twice)} twice: list each filter once")
        require(
            self.config.method != "symsimsiam",
            "method=symsimsiam has no filter to sweep over: sweep a simsiam or byol recipe "
            "(--filter symsimsiam adds the symmetric control)",
        )
        require_one_process("rdm sweep starts its own processes", "and see --jobs")

    @classmethod
    def from_recipe(cls, name: str) -> Self:
        """A sweep over the paper's filters, in runs/sweep_<name>."""
        return cls(config=replace(recipe(name), out=f"runs/sweep_{name}"))

    @property
    def runs(self) -> dict[str, Config]:
        """Every run's configuration, by name."""
        return {name: configure(self.config, name) for name in self.filter}


def check_filter_is_free(args: Sequence[str]) -> None:
    """Reject flags for what the names of the filters decide.

    Raises:
        UsageError: there are such flags.
    """
    given = {arg.partition("=")[0].replace("_", "-") for arg in args} & {*VARIED}
    require(
        not given,
        f"rdm sweep sets {', '.join(sorted(given))} itself: name filters instead, as in "
        "--filter online_s1 target_s-0.5 control",
    )
