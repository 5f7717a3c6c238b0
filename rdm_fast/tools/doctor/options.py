"""What `rdm doctor` can be asked to do. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from rdm_fast.config import Config

Switch = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """What `doctor` was asked to measure."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    json: str | None = None
    """Also write what was found and measured to this file, as JSON."""
    batches: int = 8
    """Batches measured of each stage, fewer where they take over 15 seconds."""
    debug: Switch = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"batches={self.batches}: give 1 or more")
