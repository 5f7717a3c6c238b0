"""The one door for text to a person: console, errors and warnings.

Every line goes through `printable` (control characters and line breaks are escaped) and is encoded
for its stream. Output is never a reason to stop: what a stream cannot take, because its reader or
terminal is gone, its disk is full or it was closed, is dropped.
"""

import io
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rdm_fast.errors import UserError, message_of, printable


def print_line(*lines: str, file: TextIO | None = None) -> None:
    """Print lines at once, to stdout by default."""
    if (stream := file or sys.stdout) is None:  # closed before this process began
        return
    text = "".join(printable(line) + "\n" for line in lines)
    encoding = stream.encoding or "utf-8"
    with suppress(OSError, ValueError):  # ValueError: it has been closed
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


def print_error(error: UserError, who: str = "") -> None:
    """Print `error: ...` on stderr."""
    print_line(f"error: {who}{error}", file=sys.stderr)


def traceback_of(error: BaseException) -> str:
    """A traceback in which a message, which may come from a file, is one line."""
    parts = traceback.TracebackException.from_exception(error).format()
    ours = ("  ", "\n")  # code of this program, and the sentence between an error and its cause
    lines = [p.splitlines() if p.startswith(ours) else [p.removesuffix("\n")] for p in parts]
    return "".join(printable(line) + "\n" for part in lines for line in part)


def warn(text: str, stacklevel: int = 1) -> None:
    """Give Python's warning, which a caller can filter: for classes that others use, too."""
    warnings.warn(printable(text), stacklevel=stacklevel + 1)


_item = threading.local()


@contextmanager
def about(name: str) -> Iterator[None]:
    """What this thread does now is about one of many files."""
    _item.name = name
    try:
        yield
    finally:
        _item.name = None


@contextmanager
def one_warning_a_kind(package: str) -> Iterator[None]:
    """Print each kind of a library's warnings once, at the end, with the number of files.

    It counts those that come inside `about`, in any thread. Two that differ in numbers alone are
    of one kind.
    """
    found: dict[str, tuple[str, set[str]]] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=rf"{package}\.")
        before = warnings.showwarning

        def count(message: Warning | str, *rest: Any, **more: Any) -> None:
            name = getattr(_item, "name", None)
            if name is None:
                before(message, *rest, **more)
                return
            text = " ".join(str(message).split())
            found.setdefault(re.sub(r"\d+", "0", text), (text, set()))[1].add(name)

        warnings.showwarning = count
        try:
            yield
        finally:
            for text, names in found.values():
                print_line(f"warning: {text} ({len(names)} file(s), such as {min(names)})")


# ---- the streams of a command ----------------------------------------------------------------


def guard_streams() -> None:
    """Let neither stdout nor stderr, nor any library's print or warning, end or garble a command.

    Streams that a test or another program has put in their place stay.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # else the next file that is opened would get what is printed
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or (type(stream) is io.TextIOWrapper and _number(stream) == descriptor):
            setattr(sys, name, _guarded(stream, descriptor))
    warnings.showwarning = _show
    # Of files that it can read; again in every worker and epoch. The index counts them by file.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _number(stream: TextIO) -> int | None:
    with suppress(OSError, ValueError):
        return stream.fileno()
    return None


class _Descriptor(io.RawIOBase):
    """A file descriptor that takes everything; what it cannot write is lost."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: "memoryview[int] | bytes", /) -> int:  # type: ignore[override]
        try:
            return os.write(self._descriptor, data)
        except OSError:
            return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


def _guarded(stream: io.TextIOWrapper | None, descriptor: int) -> io.TextIOWrapper:
    at_once = descriptor == 2
    if stream is not None:
        with suppress(OSError, ValueError):
            stream.flush()
        at_once = at_once or stream.line_buffering or stream.write_through
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(descriptor)),  # type: ignore[type-var]
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=at_once,
    )


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Python's hook for a warning that is shown: one line, of any library."""
    error = message if isinstance(message, Warning) else category(message)
    print_line(f"warning: {message_of(error)}", file=file or sys.stderr)
