"""What the command line makes of a setting, beside its type in Annotated.

`rdm_fast.cli.parse` passes it to tyro, so a run from Python needs none of the command line's
packages.
"""

from dataclasses import dataclass
from enum import Enum, auto


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name for a setting's flag, such as `--sigma`."""

    flag: str


class Shape(Enum):
    """Of a setting that is not a flag."""

    POSITIONAL = auto()
    """A word without a flag."""
    HIDDEN = auto()
    """For Python only."""
