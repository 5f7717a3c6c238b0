"""What settings are checked with: a mistake is one sentence with a way out."""

import difflib
from typing import Literal, get_args, get_origin, get_type_hints


def require(condition: bool, message: str) -> None:
    """Refuse a setting with a sentence that names the flag, what was found, and the way out.

    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(message)


def require_probability(flag: str, value: float) -> None:
    """Refuse a number outside [0, 1].

    Raises:
        ValueError: it is.
    """
    require(0 <= value <= 1, f"{flag}={value} is not a probability: give a number from 0 to 1")


def require_choices(table: str, settings: object) -> None:
    """Refuse a value that its Literal type does not list, as Python code could pass one.

    Raises:
        ValueError: there is one; the message names the nearest choice.
    """
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal and getattr(settings, name) not in get_args(hint):
            value, choices = getattr(settings, name), get_args(hint)
            near = difflib.get_close_matches(str(value), choices, n=1)
            way_out = f"did you mean {near[0]}?" if near else f"use one of {', '.join(choices)}"
            raise ValueError(f"{table}{name}={value!r} is unknown: {way_out}")
