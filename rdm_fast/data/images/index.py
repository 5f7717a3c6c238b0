"""The index of a folder's image files: which can be used, and their sizes.

Reading a header takes about 0.1 ms, decoding a whole file some ms, so results are cached
(`rdm_fast.data.images.tables`). A cached result holds while a file's path, size and time of change
stay the same. New, changed and bad files are inspected again.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rdm_fast.data.images.decode import MAX_PIXELS, ImageSize, inspect_image, one_line, reason
from rdm_fast.data.images.tables import Rows, folder_lock, load_table, save_table
from rdm_fast.runtime.printing import about, one_warning_a_kind, print_line

STAMP = "images 2"  # changes with the format
THREADS = 8  # they wait for the disk, and Pillow decodes without holding the interpreter
CHUNK = 4096
REPORT_EVERY, SAVE_EVERY = 10.0, 300.0  # seconds


class FileEntry(NamedTuple):
    """A file as the scan of a folder found it."""

    path: str
    """Relative to the folder."""
    size: int
    """Bytes."""
    changed: int
    """Time of the last change, in ns."""


ROW = np.dtype(
    [("size", "<i8"), ("changed", "<i8"), ("height", "<i8"), ("width", "<i8"), ("decoded", "?")]
)
"""A file of the index. Height and width are 0 if it cannot be used; `decoded` says whether all of
it was decoded, not only its header."""

Open = Callable[[FileEntry], Path | BinaryIO]


class BadFile(NamedTuple):
    """A file that cannot be used, and why."""

    path: str
    """Absolute."""
    reason: str


@dataclass(frozen=True, slots=True)
class Index:
    """The result of inspecting n files."""

    files: Sequence[FileEntry]
    rows: Rows
    """ROW, [n]."""
    bad: list[BadFile]
    changed: int = 0
    """Files that have changed since they were last inspected, names and sizes kept."""

    @property
    def usable(self) -> NDArray[np.bool_]:
        """[n]"""
        return np.asarray(self.rows["height"] > 0)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Height and width, [n, 2]."""
        return np.stack((self.rows["height"], self.rows["width"]), axis=-1)


def build(
    folder: Path,
    files: Sequence[FileEntry],
    *,
    full: bool,
    part: str = "",
    open_file: Open | None = None,
) -> Index:
    """Inspect files, or recall the cached results.

    Of several processes on one machine, one inspects and the others wait for its results.

    Args:
        folder: where the files are.
        files: the files to inspect.
        full: decode each file, too.
        part: names the selection if these are not all files of the folder; each has a cache of its
            own.
        open_file: opens a file that is part of another one; by default, the path in the folder.
    """
    index = _recall(folder, files, full, part)
    if index.usable.all():
        return index
    with folder_lock(folder):
        index = _recall(folder, files, full, part)
        if index.changed:
            print_line(
                f"warning: {index.changed} of {len(files)} files in {one_line(str(folder))} have "
                "changed since they were last used, with the same names and sizes: a run that "
                "began with them before does not go on as it would have"
            )
        missing = np.flatnonzero(~index.usable)
        saved = time.monotonic()
        inspect = partial(_inspect, full=full, open_file=open_file or (lambda f: folder / f.path))
        for k, found in _inspect_files(folder, files, missing, inspect):
            if isinstance(found, str):
                index.bad.append(BadFile(str(folder / files[k].path), found))
            else:
                index.rows[["height", "width", "decoded"]][k] = (*found, full)
            if time.monotonic() - saved > SAVE_EVERY:
                _save(folder, index, part)
                saved = time.monotonic()
        if index.usable[missing].any():
            _save(folder, index, part)
    return index


def _inspect(file: FileEntry, full: bool, open_file: Open) -> ImageSize | str:
    try:
        source = open_file(file)
    except OSError as error:
        return reason(error)
    with nullcontext() if isinstance(source, Path) else source, about(file.path):
        return inspect_image(source, full=full)


def _inspect_files(
    folder: Path,
    files: Sequence[FileEntry],
    chosen: NDArray[np.int64],
    inspect: Callable[[FileEntry], ImageSize | str],
) -> Iterator[tuple[int, ImageSize | str]]:
    """Inspect the chosen files in threads and yield results in order; print progress."""
    start = reported = time.monotonic()
    with one_warning_a_kind("PIL"), ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(chosen), CHUNK):
            chunk = chosen[first : first + CHUNK].tolist()
            yield from zip(chunk, pool.map(inspect, [files[k] for k in chunk]), strict=True)
            now, done = time.monotonic(), first + len(chunk)
            if now - reported > REPORT_EVERY:
                reported = now
                print_line(
                    f"inspected {done:,} of {len(chosen):,} files in {one_line(str(folder))} "
                    f"({done / len(chosen):.0%}, {done / (now - start):,.0f} a second)"
                )


def _recall(folder: Path, files: Sequence[FileEntry], full: bool, part: str) -> Index:
    rows = np.zeros(len(files), ROW)
    rows["size"], rows["changed"] = [f.size for f in files], [f.changed for f in files]
    changed, saved = 0, load_table(folder, part, STAMP, ROW, _is_sound)
    if saved is not None:
        places = {name: place for place, name in enumerate(saved.names)}
        place = np.array([places.get(os.fsencode(f.path), -1) for f in files], np.int64)
        old = saved.rows[place]  # those at -1 are not taken
        alike = (place >= 0) & (old["size"] == rows["size"])
        holds = alike & (old["changed"] == rows["changed"])
        changed = int((alike & ~holds).sum())
        holds &= old["decoded"] | (not full)
        rows[holds] = old[holds]
    return Index(files, rows, [], changed)


def _save(folder: Path, index: Index, part: str) -> None:
    kept = np.flatnonzero(index.usable)
    names = [index.files[k].path for k in kept.tolist()]
    save_table(folder, part, STAMP, names, index.rows[kept])


def _is_sound(rows: Rows) -> np.bool_:
    height, width = rows["height"], rows["width"]
    sides = (np.minimum(height, width) >= 1) & (np.maximum(height, width) <= MAX_PIXELS)
    return np.all(sides & (height * width <= MAX_PIXELS))  # of such sides it does not overflow
