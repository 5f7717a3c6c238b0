"""What `rdm sweep` was asked to do."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from rdm_fast.config import Config
from rdm_fast.config.checks import require
from rdm_fast.tools.sweep.grid import GRID, configure, require_name

Switch = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True, kw_only=True)
class SweepCommand:
    """What `sweep` was asked to do."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    filter: tuple[str, ...] = GRID
    """Filters, a run each: branch and g, as in online_s1, online_log_1 or target_s-0.5; control
    filters nothing, symsimsiam is the paper's symmetric control."""
    jobs: int = 0
    """Runs at a time; 0 is one a GPU, or on a CPU one a core, which share the cores' threads."""
    overwrite: Switch = False
    """Start every run anew, deleting those that the sweep's folder holds."""
    debug: Switch = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        require(bool(self.filter), "--filter needs the name of one filter or more")
        for name in self.filter:
            require_name(name)
        twice = sorted({name for name in self.filter if self.filter.count(name) > 1})
        require(not twice, f"--filter names {', '.join(twice)} twice: one run of each is enough")
        require(self.jobs >= 0, f"--jobs {self.jobs}: give 1 or more, or 0 to choose")
        require(
            self.config.method != "symsimsiam",
            "method=symsimsiam has no filter to sweep over: sweep a simsiam or byol recipe "
            "(--filter symsimsiam adds the symmetric control)",
        )

    @property
    def runs(self) -> dict[str, Config]:
        """Every run's configuration, by name."""
        return {name: configure(self.config, name) for name in self.filter}
