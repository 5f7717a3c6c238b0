"""The one door to the disk: files appear complete or not at all, and never through a link.

A rename within a folder is atomic on POSIX file systems, and durable once first the file and then
the folder have been flushed to the disk (fsync). It replaces a link, not what the link points to.
Temporary files have random names and must be new, so nobody can prepare a link for them. What is
read must be a regular file: opening a named pipe would wait for ever.
"""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path

TEMPORARY = ".tmp-"  # prefix of incomplete files and folders
NO_LINK: int = getattr(os, "O_NOFOLLOW", 0)
AT_ONCE: int = getattr(os, "O_NONBLOCK", 0)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | NO_LINK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(folder: Path) -> Path:
    """A name in a folder that nobody can foresee."""
    return folder / f"{TEMPORARY}{secrets.token_hex(8)}"


def create(path: Path, content: str | bytes = b"") -> None:
    """Write a new file (text as UTF-8) and flush it. Not atomic.

    Raises:
        FileExistsError: something has this name, if only a link to nothing.
        OSError: it cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666)
    with open(descriptor, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(descriptor)


@contextmanager
def _appearing(path: Path, content: str | bytes = b"") -> Iterator[Path]:
    """A new temporary file, flushed with this content, that takes the name `path` in the end."""
    partial = temporary(path.parent)
    try:
        create(partial, content)
        yield partial
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write in the block; it then takes the name `path`, complete and flushed.

    Raises:
        OSError: it cannot be written; the old content is untouched.
    """
    with _appearing(path) as partial:
        yield partial
        sync(partial)


def replace(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) that appears under its name complete or not at all.

    Raises:
        OSError: it cannot be written; the old content is untouched.
    """
    with _appearing(path, content):
        pass


def overwrite(path: Path, content: str) -> None:
    """Write a small file in place, for which a full disk has room where there was one before.

    Raises:
        OSError: it is not there, is a link or has several names, or cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | NO_LINK | AT_ONCE)
    with open(descriptor, "wb", buffering=0) as file:
        if not _is_ours_alone(descriptor):
            raise OSError(errno.EINVAL, "not a file with one name", str(path))
        file.write(content.encode())
        file.truncate()


def appending(path: Path) -> FileIO:
    """Open a file for reading, and for writing at its end, unbuffered; create it where missing.

    Raises:
        OSError: it cannot be written, or is a link or no regular file.
    """

    def opener(name: str, _: int) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | NO_LINK | AT_ONCE
        return os.open(name, flags, 0o666)

    file = FileIO(str(path), "a+b", opener=opener)
    if _is_ours_alone(file.fileno()):
        return file
    file.close()
    replace(path, read(path))  # a file of its own, in place of another name of somebody's file
    return FileIO(str(path), "a+b", opener=opener)


def _is_ours_alone(descriptor: int) -> bool:
    """Whether this is a regular file without a second name (a hard link)."""
    found = os.fstat(descriptor)
    return stat.S_ISREG(found.st_mode) and found.st_nlink <= 1


def remove(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder; nothing need be there.

    Raises:
        OSError: it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- reading ---------------------------------------------------------------------------------


def opened(path: Path) -> BufferedReader:
    """Open a regular file for reading, without waiting for one that is none.

    Raises:
        OSError: it is not there, cannot be read, or is a pipe, device, socket or folder.
    """
    descriptor = os.open(path, os.O_RDONLY | AT_ONCE)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def read(path: Path) -> bytes:
    """The content of a regular file. Raises as `opened`."""
    with opened(path) as file:
        return file.read()
