"""Tables in Markdown, and writing them into a file between two markers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Columns = dict[str, Callable[[dict[str, Any]], str]]
"""Header and cell of each column."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers right-aligned from the second column on."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def table_of(rows: Sequence[dict[str, Any]], columns: Columns) -> str:
    """A Markdown table with a row for each result."""
    return table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def replace_between(path: Path, name: str, text: str) -> None:
    """Write text between the lines `<!-- name: begin -->` and `<!-- name: end -->` of a file.

    Raises:
        ValueError: the file does not have each of them once, in this order.
    """
    before, _, after = _split(path, name)
    begin, end = _markers(name)
    path.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")


def between(path: Path, name: str) -> str:
    """The text between the markers, stripped.

    Raises:
        ValueError: as `replace_between`.
    """
    return _split(path, name)[1].strip()


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def _split(path: Path, name: str) -> tuple[str, str, str]:
    """A file before, between and after the markers."""
    begin, end = _markers(name)
    before, first, rest = path.read_text(encoding="utf-8").partition(begin)
    inside, second, after = rest.partition(end)
    if not (first and second) or begin in rest or end in before + after:
        raise ValueError(f"{path} needs one line {begin!r} and after it one line {end!r}")
    return before, inside, after
