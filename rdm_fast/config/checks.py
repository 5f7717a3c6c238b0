"""Config validation; every error says how to fix it."""

import difflib
import math
from collections.abc import Iterable
from typing import Literal, get_args, get_origin, get_type_hints

from rdm_fast.errors import UsageError


def require(condition: bool, message: str) -> None:
    """Reject a setting. The message names the flag, the value found, and the fix.

    Raises:
        UsageError: the condition does not hold.
    """
    if not condition:
        raise UsageError(message)


def require_between(
    table: str, settings: object, names: Iterable[str], low: float, high: float = math.inf
) -> None:
    """Require finite numbers from `low` to `high` in these settings.

    Raises:
        UsageError: a number is outside.
    """
    allowed = f"give {low} or more" if high == math.inf else f"give a number from {low} to {high}"
    for name in names:
        value = getattr(settings, name)
        inside = math.isfinite(value) and low <= value <= high
        require(inside, f"{table}{name}={value}: {allowed}")


def require_range(flag: str, limits: tuple[float, float], most: float = math.inf) -> None:
    """Require two finite numbers above 0, in rising order, of at most `most`.

    Raises:
        UsageError: they are not.
    """
    low, high = limits
    bound = "" if most == math.inf else f" and up to {most}"
    require(
        0 < low <= high <= most and high < math.inf,
        f"{flag}={limits}: give two rising numbers above 0{bound}",
    )


def require_choices(table: str, settings: object) -> None:
    """Require values that Literal types list; Python code could pass others.

    Raises:
        UsageError: a value is unknown. The message names the nearest choice.
    """
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal:
            value, choices = getattr(settings, name), get_args(hint)
            fix = did_you_mean(str(value), choices, f"use one of {', '.join(choices)}")
            require(value in choices, f"{table}{name}={value!r} is unknown: {fix}")


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """The nearest known word as a question, or `otherwise` if none is near."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else otherwise
