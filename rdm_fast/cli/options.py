"""Options of the commands that start from a recipe and have no package of their own."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from rdm_fast.config import Config
from rdm_fast.config.checks import require
from rdm_fast.config.parallel import check_nproc


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Options of `rdm train`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    nproc: str = "1"
    """Ranks to start on this machine: a number, gpu (one per GPU), or auto (gpu, or 1 without)."""
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


@dataclass(frozen=True, kw_only=True)
class PreviewCommand:
    """Options of `rdm preview`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    images: int = 8
    """Number of images, one row each."""
    sheet: str = "preview.png"
    """Picture file to write."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        require(self.images >= 2, f"--images {self.images}: give 2 or more")
