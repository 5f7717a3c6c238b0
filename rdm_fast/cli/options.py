"""Options of the commands that start from a recipe and have no package of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from rdm_fast.config import Config
from rdm_fast.config.checks import Between, require, require_fields
from rdm_fast.config.saved import check_allowed
from rdm_fast.errors import UsageError
from rdm_fast.runtime.launcher import check_nproc

WITH_RESUME = ("--resume", "--nproc", "--max-restarts", "--print-config", "--debug")
"""Flags that may accompany --resume."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Options of `rdm train`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    nproc: str = "1"
    """Ranks to start on this machine: a number, gpu (one per GPU), or auto (gpu, or 1 without)."""
    max_restarts: Annotated[int, Between(0, 1000)] = 0
    """With --nproc: how often all ranks start again by themselves, from the last checkpoint, after
    one was lost (code 76)."""
    resume: str | None = None
    """Continue the run in this folder with the configuration it was started with."""
    overwrite: bool = False
    """Delete the run that the run folder holds and start a new one."""
    allow_change: tuple[str, ...] = ()
    """Names of schedule fields that may differ from the run being resumed, such as optim.epochs."""
    print_config: bool = False
    """Print the whole configuration as YAML and exit."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        check_nproc(self.nproc)
        check_allowed(self.allow_change)
        require_fields("--", self)
        require(
            self.max_restarts == 0 or self.nproc != "1",
            f"--max-restarts {self.max_restarts} needs --nproc: other launchers restart ranks in "
            "their own way (docs/scaling.md)",
        )


def check_resume_is_alone(args: Sequence[str]) -> None:
    """Reject flags that would change the configuration, or delete the run, that --resume continues.

    Raises:
        UsageError: there are such flags.
    """
    flags = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
    recipe = [] if args[0].startswith("-") else [args[0]]
    given = recipe + [flag for flag in flags if flag.replace("_", "-") not in WITH_RESUME]
    if given:
        raise UsageError(
            "--resume continues a run with the configuration in its folder: leave out "
            f"{', '.join(given)}, or give recipe and --out instead of --resume"
        )


@dataclass(frozen=True, kw_only=True)
class PreviewCommand:
    """Options of `rdm preview`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    images: Annotated[int, Between(2, 1000)] = 8
    """Number of images, one row each."""
    sheet: str = "preview.png"
    """Picture file to write."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        require_fields("--", self)
