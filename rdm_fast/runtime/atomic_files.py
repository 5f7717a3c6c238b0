"""Atomic writes: a crash leaves either the old content or the new, never a mixture.

A rename within a folder is atomic on POSIX file systems, and durable once first the file and then
the folder have been flushed to the disk (fsync).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"  # prefix of incomplete files and folders


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: str | bytes) -> None:
    """Write a file and flush it. Not atomic: for folders that are then renamed."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write in the block; it then takes the name `path`, complete and flushed.

    Raises:
        OSError: it cannot be written; the old content is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) that appears under its name complete or not at all.

    Raises:
        OSError: it cannot be written; the old content is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
