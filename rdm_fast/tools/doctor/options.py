"""Options of `rdm doctor`. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from rdm_fast.config import Config
from rdm_fast.config.checks import Count, require_fields
from rdm_fast.runtime.launcher import require_one_process


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """Options of `rdm doctor`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    json: str | None = None
    """Also write the findings and measurements to this file, as JSON."""
    batches: Count = 8
    """Batches to measure in each stage; fewer if they take over 15 seconds."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        require_fields("--", self)
        require_one_process(
            "rdm doctor measures one process", "and give --optim.global-batch the share of one rank"
        )
