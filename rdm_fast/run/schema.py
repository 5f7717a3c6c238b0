"""What is loaded has the promised fields, or one error names the file and the field.

A schema is a table: the name of each field that must be there, and what it may hold. Other fields
are information, which nothing reads. Nothing here imports torch.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rdm_fast.config.checks import MANY, shown
from rdm_fast.errors import DataError


@dataclass(frozen=True, slots=True)
class Field:
    """What a field may hold, in words and as a test."""

    what: str
    fits: Callable[[Any], bool]


Schema = Mapping[str, Field]
LARGEST = sys.float_info.max


def whole(low: int = 0, high: int = MANY) -> Field:
    """A whole number in these bounds; True and False are none."""
    what = f"{low}" if low == high else f"a whole number from {low} to {high}"
    return Field(what, lambda v: type(v) is int and low <= v <= high)


def text(pattern: str, what: str) -> Field:
    """A text that a regular expression describes."""
    return Field(what, lambda v: isinstance(v, str) and re.fullmatch(pattern, v) is not None)


def one_of(choices: Iterable[Any]) -> Field:
    """One of these texts, or None if it is among them."""
    known = list(choices)
    return Field(
        f"one of {', '.join(map(str, known))}",
        lambda v: (v is None or isinstance(v, str)) and v in known,
    )


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; True and False are none."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and -LARGEST <= value <= LARGEST  # whole numbers may be too large for a float


def table(inner: Schema | None = None) -> Field:
    """A table with these fields, or with any."""
    return Field(
        "a table" + (f" with {', '.join(inner)}" if inner else ""),
        lambda v: isinstance(v, dict) and all(_fits(v, *each) for each in (inner or {}).items()),
    )


POSITIVE = Field("a number above 0", lambda v: is_number(v) and v > 0)
PERCENT = Field("a number from 0 to 100", lambda v: is_number(v) and 0 <= v <= 100)
PERCENT_OR_NONE = Field(f"{PERCENT.what}, or null", lambda v: v is None or PERCENT.fits(v))
ANY_TEXT = Field("a text", lambda v: isinstance(v, str))
SHA256 = text("[0-9a-f]{64}", "a SHA-256")


def _fits(content: Mapping[str, Any], name: str, field: Field) -> bool:
    return name in content and field.fits(content[name])


def wrong(content: Mapping[str, Any], schema: Schema) -> str:
    """The first field that is missing or unlike its schema, as a part of a sentence; or nothing."""
    for name, field in schema.items():
        if name not in content:
            return f"has no {name}, which must be {field.what}"
        if not field.fits(content[name]):
            return f"has {name}={shown(content[name])}, which must be {field.what}"
    return ""


def require(content: Mapping[str, Any], schema: Schema, file: object) -> None:
    """Check what was loaded from a file.

    Raises:
        DataError: a field is missing or unlike its schema. The message names file and field.
    """
    if why := wrong(content, schema):
        raise DataError(f"{file} {why}: restore it from a copy, or do without it")
