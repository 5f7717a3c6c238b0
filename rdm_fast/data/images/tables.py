"""Tables about the files of a folder, saved beside them or in the user's cache folder.

A table has a name and a row of numbers for each file. It is an uncompressed `.npz`, whose checksums
reveal damage; SQLite has none, and takes longer to read a million rows.
"""

import hashlib
import io
import math
import os
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.distributed import print0
from rdm_fast.runtime.lock import Lock

NAME = ".rdm_fast_index"
STUCK = 60.0
"""Seconds without a sign of life after which a process that holds the lock is not waited for."""

Rows = NDArray[Any]
"""A structured array, [n]."""


class Table(NamedTuple):
    """What is known of n files."""

    names: list[bytes]
    rows: Rows


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Best-effort lock: one process per user and machine works on the folder.

    It is in a folder that nobody else can write to. Without one, or if its holder has stopped, the
    work is done without the lock, which costs time alone.
    """
    lock: Lock | None = None
    with suppress(OSError):
        lock = Lock(_private_folder() / f"{_key(folder)}.lock")
        if lock.acquire(math.inf, stuck=STUCK):
            lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _private_folder() -> Path:
    """This user's folder for locks, beside everybody's temporary files.

    Raises:
        OSError: it cannot be made, or has this name and belongs to somebody else.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir(), f"rdm-fast-{user}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise OSError(f"{folder} is not a private folder of this user")
    return folder


def load_table(
    folder: Path, part: str, stamp: str, dtype: np.dtype[Any], is_sound: Callable[[Rows], np.bool_]
) -> Table | None:
    """The table that `save_table` saved; None if there is none that can be trusted.

    Args:
        folder: where the files are.
        part: names a table about some of them.
        stamp: must equal the saved one.
        dtype: of the rows.
        is_sound: checks values: somebody else may have written the file.
    """
    for place in _places(folder, part):
        # zipfile and numpy raise many kinds for a damaged file
        with suppress(Exception), atomic_files.opened(place) as file:
            with zipfile.ZipFile(file) as members:  # a small file must not unpack to a huge one
                size = os.fstat(file.fileno()).st_size
                if sum(info.file_size for info in members.infolist()) > size:
                    continue
            file.seek(0)
            with np.load(file, allow_pickle=False) as saved:
                names, rows = saved["names"].tobytes().split(b"\0"), saved["rows"]
                known = saved["stamp"] == stamp and rows.dtype == dtype
            if known and rows.shape == (len(names),) and is_sound(rows):
                return Table(names, rows)
    return None


def save_table(folder: Path, part: str, stamp: str, names: Iterable[str], rows: Rows) -> None:
    """Save a table beside the files, or in the user's cache; if neither works, print a note."""
    joined = np.frombuffer(b"\0".join(map(os.fsencode, names)), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, stamp=np.array(stamp), names=joined, rows=rows)
    why = ""
    for place in _places(folder, part):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.replace(place, buffer.getvalue())
            return
        except OSError as error:
            why = f"{place}: {error.strerror}"
    print0(f"note: the index of {folder} cannot be saved ({why}): the next start makes it again")


def _places(folder: Path, part: str) -> list[Path]:
    """Where a table may be, best first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with suppress(RuntimeError):  # there is no home
        cache = cache.expanduser()
    end = f"-{part}.npz" if part else ".npz"
    cached = cache / "rdm-fast" / f"{_key(folder)}{end}"
    return [folder / f"{NAME}{end}", *([cached] if cached.is_absolute() else [])]


def _key(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
