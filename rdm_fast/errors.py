"""Errors that a user can fix, each with its exit code.

A `UserError` is one sentence: the flag or file, what is wrong with it, and how to fix it.
`rdm_fast.cli.commands` prints it as a single `error:` line on rank 0, without a traceback, and
exits with its code. Any other exception is a bug (code 70).
"""

import errno
import os
import re
from typing import ClassVar

COLORS = re.compile(r"\x1b\[[0-9;]*m")
"""Terminal codes that libraries put into their messages."""


def printable(text: str) -> str:
    r"""The text on one line, with control characters, line breaks and bad bytes as \n or \udc80."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def message_of(error: BaseException) -> str:
    """The whole text of any library's exception on one printable line; its type if it has none."""
    return printable(" ".join(COLORS.sub("", str(error)).split())) or type(error).__name__


class UserError(Exception):
    """One sentence for the user; `code` is the process's exit status (BSD sysexits)."""

    code: ClassVar[int] = 70

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class UsageError(UserError, ValueError):
    """Invalid flag or combination of flags."""

    code = 2


class DataError(UserError):
    """A file exists but cannot be used: corrupt, of another architecture, too small."""

    code = 65


class InputMissing(UserError):
    """A data set or checkpoint is missing."""

    code = 66


class Unavailable(UserError):
    """A requested device, library or engine is not available."""

    code = 69


class NonFinite(UserError):
    """The loss or a gradient is no longer finite."""

    code = 71


class Collapsed(UserError):
    """The projections collapsed, with guard.mode=stop."""

    code = 71


class CannotCreate(UserError):
    """The output folder is not a run folder, not writable, or locked by another run."""

    code = 73


class OutputFailed(UserError):
    """Writing failed repeatedly, for example because the disk is full."""

    code = 74


class WorkersFailed(OutputFailed):
    """A process that loads data was killed, hangs, or has no memory to hand its images over."""


class Interrupted(UserError):
    """Stopped by a signal with the state saved; the same command resumes."""

    code = 75


class RankLost(UserError):
    """Another rank died or hung."""

    code = 76


class ConfigMismatch(UserError):
    """The configuration contradicts the checkpoint."""

    code = 78


class OutOfMemory(Unavailable):
    """This machine or GPU has less memory than was asked for."""


MEMORY = re.compile(
    "can't allocate|cannot allocate|unable to allocate|not enough memory|out of memory|bad_alloc"
    "|alloc_failed|size calculation overflowed|can't start new thread",
    re.IGNORECASE,
)
"""What libraries say when they get no memory: torch and CUDA raise a plain RuntimeError."""
ASKED = re.compile(r"(?:tried|unable) to allocate (\d[\d.]* \w+)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether any library's exception says that there is not enough memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    by_text = isinstance(error, RuntimeError) and MEMORY.search(str(error)) is not None
    return by_text or isinstance(error, MemoryError)


def explained(error: Exception, where: str, lower: str) -> UserError:
    """The error to report for any exception.

    Args:
        error: the exception. One that a user can fix stays as it is, one of a file has code 74, one
            of memory 69; any other is a bug (70).
        where: shows a bug's traceback.
        lower: the flags that lower how much memory is needed.
    """
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        asked = ASKED.search(str(error))
        amount = f" for another {asked[1]}" if asked else ""
        fix = f"lower {lower}, or end other programs" if lower else "end other programs"
        return OutOfMemory(f"there is not enough memory{amount}: {fix}; what was saved is kept")
    what = f"{type(error).__name__}: {message_of(error)}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return OutputFailed(
            f"{os.fsdecode(error.filename)} cannot be read or written ({error.strerror}): check "
            "that it is what it should be, and its permissions"
        )
    return UserError(f"{what}; this is a bug, {where}")
