"""Config validation; every error says how to fix it."""

import difflib
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from rdm_fast.errors import UsageError


def require(condition: object, message: str) -> None:
    """Reject a setting. The message names the flag, the value found, and the fix.

    Raises:
        UsageError: the condition does not hold.
    """
    if not condition:
        raise UsageError(message)


@dataclass(frozen=True, slots=True)
class Between:
    """The least and the largest number that a setting takes; stands beside its type in Annotated.

    Attributes:
        low, high: both finite, so NaN and infinity are outside. They bound each number of a tuple.
        above: low itself is outside.
        rising: of two numbers, the second is at least the first.
    """

    low: float
    high: float
    above: bool = False
    rising: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a number, or each number of a tuple, is inside."""
        numbers = value if isinstance(value, tuple) else (value,)
        inside = all(self.low <= n <= self.high and not (self.above and n == self.low)
                     for n in numbers)  # fmt: skip
        return inside and not (self.rising and numbers[0] > numbers[1])

    def __str__(self) -> str:
        numbers = "two rising numbers" if self.rising else "a number"
        start = f"above {self.low}" if self.above else f"from {self.low}"
        return f"{numbers} {start} to {self.high}"


MOST_SHOWN = 80
MANY = 10**9
"""The largest number of steps or images that a setting takes."""
Share = Annotated[float, Between(0, 1)]
Count = Annotated[int, Between(1, MANY)]
CountOrNone = Annotated[int, Between(0, MANY)]
Seed = Annotated[int, Between(0, 2**63 - 1)]
"""What torch, numpy and Philox all take."""


def require_fields(table: str, settings: object) -> None:
    """Require values that the types list: choices of a Literal, numbers inside their `Between`.

    Texts must be ones that a path can be.

    Args:
        table: stands before each name in messages: a table of settings, or `--` for a command's.
        settings: a dataclass.

    Raises:
        UsageError: a value is unknown or outside. The message names it and what to give instead.
    """
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        flag = f"{table}{name}".replace("_", "-") if table == "--" else f"{table}{name}"
        plain, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if get_origin(plain) is Literal:
            choices = get_args(plain)
            fix = did_you_mean(str(value), choices, f"use one of {', '.join(choices)}")
            require(value in choices, f"{flag}={value!r} is unknown: {fix}")
        if isinstance(value, str):  # as paths and config.yaml need it
            sound = "\0" not in value and value.encode(errors="ignore").decode() == value
            require(sound, f"{flag}={value!r}: give a text that is UTF-8 and has no NUL")
        for bounds in notes:
            if isinstance(bounds, Between):
                require(bounds.holds(value), f"{flag}={shown(value)}: give {bounds}")


def shown(value: object) -> str:
    """A value in a message: the beginning of a long one."""
    text = reprlib.repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """The nearest known word as a question, or `otherwise` if none is near.

    A word with something added, such as --batch-size for --batch, is nearest.
    """
    words = list(known)
    near = [each for each in words if word.lower().startswith(f"{each}-")]
    near = near or difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else otherwise
