"""One look at every image file: which can be used, how large they are, what they hold.

A look costs a tenth of a millisecond (the header) to some milliseconds (all of it), so its result
is kept in a file beside the images, or in the user's cache folder where that cannot be written. It
holds for a file as long as its path, size and time of change stay as they were; whatever is not in
it, and every file that could not be used, is looked at again.
"""

import hashlib
import io
import os
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from rdm_fast.data.images.decode import MAX_PIXELS, Header, look, one_line, reason
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.distributed import print0

NAME = ".rdm_fast_index"
FORMAT = 1
THREADS = 8  # a look waits for the disk, and Pillow decodes without holding the interpreter
AT_ONCE = 4096
TELL_EVERY, SAVE_EVERY = 10.0, 300.0  # seconds


class Found(NamedTuple):
    """A file as the scan of a folder found it."""

    path: str
    """Relative to the folder."""
    size: int
    """Bytes."""
    changed: int
    """Time of the last change, in ns."""


Opened = Callable[[Found], Path | BinaryIO]


class BadFile(NamedTuple):
    """A file that cannot be used, and why."""

    path: str
    """Whole, not relative."""
    reason: str


@dataclass(frozen=True, slots=True)
class Index:
    """What is known of some files: an array [n] a field. Where `usable` is False, the rest is 0."""

    files: Sequence[Found]
    usable: NDArray[np.bool_]
    decoded: NDArray[np.bool_]
    """Whether the whole file was decoded, not only its header."""
    sizes: NDArray[np.int64]
    """Height and width, [n, 2]."""
    kinds: NDArray[np.uint8]
    """Row of `kind_names`."""
    kind_names: list[str]
    """Format and Pillow mode, as `Header.kind`."""
    bad: list[BadFile]
    """The files that cannot be used."""


def build(
    folder: Path,
    files: Sequence[Found],
    *,
    full: bool,
    part: str = "",
    opened: Opened | None = None,
) -> Index:
    """Look at files, or recall what an earlier look found.

    Of the processes of one machine, one looks and the others wait for what it saves.

    Args:
        folder: where they are.
        files: to be looked at.
        full: decode each, too.
        part: names the selection if these are not all files of the folder, which then has a saved
            index of its own.
        opened: opens one of the files if they are parts of others, not paths in the folder.
    """
    index = _recall(folder, files, full, part)
    if index.usable.all():
        return index
    opened = opened or (lambda file: folder / file.path)
    with alone(folder):
        index = _recall(folder, files, full, part)
        missing = np.flatnonzero(~index.usable)
        saved = time.monotonic()
        for rows, looks in _looks(folder, files, missing, full, opened):
            for k, seen in zip(rows.tolist(), looks, strict=True):
                _enter(index, folder, k, seen, full)
            if time.monotonic() - saved > SAVE_EVERY:
                _save(folder, index, part)
                saved = time.monotonic()
        if index.usable[missing].any():
            _save(folder, index, part)
    return index


def _enter(index: Index, folder: Path, k: int, seen: Header | str, full: bool) -> None:
    if isinstance(seen, str):
        index.bad.append(BadFile(str(folder / index.files[k].path), seen))
        return
    if seen.kind not in index.kind_names:
        index.kind_names.append(seen.kind)
    index.usable[k], index.decoded[k] = True, full
    index.sizes[k] = seen.height, seen.width
    index.kinds[k] = index.kind_names.index(seen.kind)


def _seen(file: Found, full: bool, opened: Opened) -> Header | str:
    try:
        source = opened(file)
    except OSError as error:
        return reason(error)
    with nullcontext() if isinstance(source, Path) else source:
        return look(source, full=full)


def _looks(
    folder: Path, files: Sequence[Found], rows: NDArray[np.int64], full: bool, opened: Opened
) -> Iterator[tuple[NDArray[np.int64], list[Header | str]]]:
    """Looks at some of the files, in their order, some thousands at a time; tells how far it is."""
    start = told = time.monotonic()
    Image.init()  # loads Pillow's formats, which threads should not do at the same time
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # Pillow's, of oddities in files that it can read
        for first in range(0, len(rows), AT_ONCE):
            part = rows[first : first + AT_ONCE]
            some = (files[k] for k in part.tolist())
            yield part, list(pool.map(partial(_seen, full=full, opened=opened), some))
            now, done = time.monotonic(), first + len(part)
            if now - told > TELL_EVERY:
                told = now
                print(
                    f"looked at {done:,} of {len(rows):,} files in {one_line(str(folder))} "
                    f"({done / len(rows):.0%}, {done / (now - start):,.0f} a second)",
                    flush=True,
                )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While no other process of this user on this machine does the same, if that can be had."""
    lock = Path(tempfile.gettempdir(), f"rdm-fast-{os.getuid()}-{_key(folder)}.lock")
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(FileLock(lock, mode=0o600))
        yield


# ---- the saved index -------------------------------------------------------------------------

Arrays = dict[str, NDArray[Any]]


def _key(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]


def _places(folder: Path, part: str) -> list[Path]:
    """Where the index of a folder may be, best first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with suppress(RuntimeError):  # there is no home
        cache = cache.expanduser()
    end = f"-{part}.npz" if part else ".npz"
    own = cache / "rdm-fast" / f"{_key(folder)}{end}"
    return [folder / f"{NAME}{end}", *([own] if own.is_absolute() else [])]


def _recall(folder: Path, files: Sequence[Found], full: bool, part: str) -> Index:
    n = len(files)
    index = Index(
        files, np.zeros(n, np.bool_), np.zeros(n, np.bool_), np.zeros((n, 2), np.int64),
        np.zeros(n, np.uint8), [], [],
    )  # fmt: skip
    arrays = recall_arrays(folder, part, _is_sound)
    if arrays is None:
        return index
    at = {path: row for row, path in enumerate(split(arrays))}
    rows = np.array([at.get(os.fsencode(file.path), -1) for file in files], np.int64)
    there = np.flatnonzero(rows >= 0)
    rows = rows[there]
    now = np.array([files[k][1:] for k in there.tolist()], np.int64).reshape(-1, 2)
    holds = (arrays["files"][rows] == now).all(axis=1) & (arrays["decoded"][rows] | (not full))
    there, rows = there[holds], rows[holds]
    index.usable[there] = True
    index.kind_names.extend(arrays["kind_names"].tolist())
    for name in ("decoded", "sizes", "kinds"):
        getattr(index, name)[there] = arrays[name][rows]
    return index


def recall_arrays(folder: Path, part: str, is_sound: Callable[[Arrays], bool]) -> Arrays | None:
    """What `save_arrays` saved; None if there is nothing that can be used."""
    for place in _places(folder, part):
        with suppress(Exception):  # zipfile and numpy have many for a damaged file; made anew then
            with zipfile.ZipFile(place) as members:  # else a small file could fill the memory
                if sum(info.file_size for info in members.infolist()) > place.stat().st_size:
                    continue
            with np.load(place, allow_pickle=False) as saved:
                arrays: Arrays = dict(saved)
            if is_sound(arrays):
                return arrays
    return None


def _save(folder: Path, index: Index, part: str) -> None:
    """Save what is known of the usable files."""
    kept = np.flatnonzero(index.usable)
    files = [index.files[k] for k in kept.tolist()]
    paths = [os.fsencode(file.path) for file in files]
    arrays: Arrays = {
        "format": np.array(FORMAT),
        "paths": np.frombuffer(b"".join(paths), np.uint8),
        "ends": np.cumsum([0, *map(len, paths)], dtype=np.int64),
        "files": np.array([file[1:] for file in files], np.int64).reshape(-1, 2),
        "sizes": index.sizes[kept],
        "kinds": index.kinds[kept],
        "kind_names": np.array(index.kind_names, np.str_),
        "decoded": index.decoded[kept],
    }
    save_arrays(folder, part, arrays)


def save_arrays(folder: Path, part: str, arrays: Arrays) -> None:
    """Save arrays beside the images, or in the user's cache; a note is printed if neither works."""
    buffer = io.BytesIO()
    named: dict[str, Any] = {**arrays}
    np.savez(buffer, **named)  # zip has a checksum of each array
    why = ""
    for place in _places(folder, part):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.replace(place, buffer.getvalue())
            return
        except OSError as error:
            why = f"{place}: {error.strerror}"
    print0(f"note: the index of {folder} is not saved ({why}): the next start makes it again")


def split(arrays: Arrays) -> list[bytes]:
    """Names that were saved one after another."""
    joined, ends = arrays["paths"].tobytes(), arrays["ends"].tolist()
    return [joined[a:b] for a, b in pairwise(ends)]


def _is_sound(arrays: Arrays) -> bool:
    """Whether the arrays fit together: the file may be somebody else's."""
    n, ends, sizes = len(arrays["files"]), arrays["ends"], arrays["sizes"]
    expected = {
        "files": ("i8", (n, 2)), "sizes": ("i8", (n, 2)), "kinds": ("u1", (n,)),
        "decoded": ("?", (n,)), "ends": ("i8", (n + 1,)), "paths": ("u1", (len(arrays["paths"]),)),
    }  # fmt: skip
    return bool(
        arrays["format"] == FORMAT
        and all(arrays[k].dtype == np.dtype(kind) for k, (kind, _) in expected.items())
        and all(arrays[k].shape == shape for k, (_, shape) in expected.items())
        and ends[0] == 0
        and ends[-1] == len(arrays["paths"])
        and (np.diff(ends) > 0).all()
        and (sizes >= 1).all()
        and (sizes <= MAX_PIXELS).all()  # else the product could overflow
        and (sizes.prod(axis=1) <= MAX_PIXELS).all()
        and (arrays["kinds"] < len(arrays["kind_names"])).all()
    )
