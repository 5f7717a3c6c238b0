"""Command line of `rdm export`. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Literal

import tyro

from rdm_fast.config.run import Branch
from rdm_fast.tools.export.targets import Target


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a run's backbone for another program."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder (its newest checkpoint), or one step folder inside its checkpoints."""
    to: Target
    """The program that will load the weights."""
    branch: Literal[Branch, "auto"] = "auto"
    """For a run whose method keeps target weights (EMA): the branch to write; auto takes the
    method's."""
    out: str | None = None
    """File to write (for hf a folder); by default export/STEP-TARGET in the run folder."""
    overwrite: bool = False
    """Replace an earlier export."""
    debug: bool = False
    """Show the traceback of an error."""
