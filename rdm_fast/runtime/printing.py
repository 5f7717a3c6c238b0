"""Text for a person: what a terminal cannot show is escaped, and each line is flushed at once."""

import os
import sys
from typing import TextIO

from rdm_fast.errors import UserError, printable


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print text, to stdout by default; characters outside the stream's encoding are escaped."""
    file = file or sys.stdout
    text = "\n".join(map(printable, text.split("\n")))
    encoding = file.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def print_error(error: UserError, who: str = "") -> None:
    """Print `error: ...` on stderr."""
    print_line(f"error: {who}{error}", sys.stderr)


def launched_rank() -> int:
    """This process's rank as its launcher has set it, before there is a process group."""
    return int(os.environ.get("RANK", "0"))
