"""Options of `rdm sweep`. Nothing here imports torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import tyro

from rdm_fast.config import Config
from rdm_fast.config.checks import Between, require, require_fields
from rdm_fast.config.flags import Shape
from rdm_fast.config.recipes import RECIPES
from rdm_fast.runtime.launcher import require_one_process
from rdm_fast.tools.sweep.grid import GRID, configure, require_name
from rdm_fast.tools.sweep.methods import METHODS, SWEEPS, configure_method, require_method

VARIED = (
    *("--predictor", "--filter.kind", "--filter.location", "--filter.sigma"),
    *("--pred-type", "--pred-location", "--sigma"),
)
"""Flags that a filter's name sets."""


@dataclass(frozen=True, kw_only=True)
class SweepCommand:
    """Options of `rdm sweep`."""

    recipes: ClassVar[Mapping[str, Callable[[], Config]]] = RECIPES | SWEEPS
    config: Annotated[Config, tyro.conf.arg(name="")]
    of: Annotated[str, Shape.HIDDEN] = ""
    """The recipe, or the sweep over methods."""
    methods: tuple[str, ...] = ()
    """Methods of a sweep such as digits_methods, one run each; they include ablations."""
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
        over = self.over_methods
        kind, given = ("methods", self.methods) if over else ("filter", self.filter)
        require(bool(given), f"--{kind} needs a name or more")
        for name in given:
            require_method(name) if over else require_name(name)
        twice = sorted({name for name in given if given.count(name) > 1})
        require(not twice, f"--{kind} lists {', '.join(twice)} twice: list each once")
        require(
            over or not self.methods,
            "--methods is for sweeps over methods, such as digits_methods: name filters instead",
        )
        require(
            not over or self.filter == GRID,
            f"--filter is for sweeps over filters: with {self.of}, give --methods",
        )
        require(
            self.config.method != "symsimsiam",
            "method=symsimsiam has no filter to sweep over: sweep a simsiam or byol recipe "
            "(--filter symsimsiam adds the symmetric control)",
        )
        require_one_process("rdm sweep starts its own processes", "and see --jobs")

    @classmethod
    def from_recipe(cls, name: str) -> Self:
        """A sweep over the paper's filters, or over methods, in runs/sweep_<name>."""
        config = replace(cls.recipes[name](), out=f"runs/sweep_{name}")
        return cls(config=config, of=name, methods=METHODS if name in SWEEPS else ())

    @property
    def over_methods(self) -> bool:
        return self.of in SWEEPS

    @property
    def runs(self) -> dict[str, Config]:
        """Every run's configuration, by name."""
        if self.over_methods:
            return {name: configure_method(self.of, self.config, name) for name in self.methods}
        return {name: configure(self.config, name) for name in self.filter}


def check_varied_is_free(command: SweepCommand, args: Sequence[str]) -> None:
    """Reject flags for what the names of filters or methods decide.

    Raises:
        UsageError: there are such flags.
    """
    varied, instead = {*VARIED}, "filters instead, as in --filter online_s1 target_s-0.5 control"
    if command.over_methods:
        varied, instead = varied | {"--method"}, "methods instead, as in --methods simsiam dino"
    given = {arg.partition("=")[0].replace("_", "-") for arg in args} & varied
    require(not given, f"rdm sweep sets {', '.join(sorted(given))} itself: name {instead}")
