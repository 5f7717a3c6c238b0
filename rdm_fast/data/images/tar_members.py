"""The images in tar files, as WebDataset packs them: where each lies, and its label.

WebDataset's suffix is all that follows the first point of a name, and what stands before it is the
key of a sample. An image has such a suffix, or it ends in one and no other image has its key, as
IMG_2020.01.00.jpg: then its key ends at the last point. Further images of a sample, as x.seg.png
beside x.jpg, are left out and listed.

A label is the content of KEY.cls, or under `label` or `cls` in KEY.json: a whole number, or text,
the name of a class. Any other label is listed, and its image has none.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rdm_fast.data.images.decode import SUFFIXES
from rdm_fast.data.images.names import NOT_READ, class_name, is_image, is_litter
from rdm_fast.data.images.tables import Rows, folder_lock, load_table, save_table
from rdm_fast.errors import DataError, message_of

STAMP = "members 3"  # changes with the format
LABEL_BYTES = 1 << 20
NO_LABEL = -1
MAX_LABEL = (1 << 20) - 1  # each class has a name in memory
LONGEST_NAME = 256  # characters; a longer text is a caption
THREADS = 8
LEFT_OUT = (
    "further images of a sample",
    "images in formats that are not read",
    "images that are links or sparse",
    "hidden or system files with an image's suffix",
    "labels that are no number or name",
)
"""Why a member is not used."""
FURTHER, UNREAD, LINK, HIDDEN, BAD_LABEL = LEFT_OUT


class Member(NamedTuple):
    """An image in a shard."""

    name: str
    shard: int
    """Which of the shards."""
    offset: int
    """Place of its first byte in the shard."""
    size: int
    """Bytes."""
    label: int


class Listing(NamedTuple):
    """What is in some shards."""

    members: list[Member]
    classes: list[str]
    """Names in label order; empty if no image has a label."""
    left_out: list[tuple[str, str]]
    """Members that are not used, as SHARD/NAME, and why, one of LEFT_OUT."""


class Shard(NamedTuple):
    """The same for one shard, whose labels are numbers and names."""

    images: list[tuple[Member, int | str]]
    left_out: list[tuple[str, str]]


IMAGE, CLASS, OTHER = 0, 1, 2
ROW = np.dtype([(name, "<i8") for name in ("kind", *Member._fields[1:])])
"""An image; or a class, whose label is the row's; or a member left out, and why in `label`."""


class MemberFile(io.RawIOBase):
    """Part of a file as a file of its own, read only where it is asked for."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._start, self._size, self._at = offset, size, 0
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_CUR: self._at, os.SEEK_END: self._size}.get(whence, 0))
        return self._at

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        room = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._start + self._at)
        got = self._file.readinto(memoryview(buffer)[:room]) or 0
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()


def list_members(shards: Sequence[Path], part: str) -> Listing:
    """The images of the shards in order, listed now or recalled from an earlier listing.

    Args:
        shards: tar files of one folder.
        part: tells these from other shards there.

    Raises:
        DataError: a shard is damaged.
    """
    folder, part = shards[0].parent, f"{part}-members"
    state = [(s.stat().st_size, s.stat().st_mtime_ns) for s in shards]
    stamp = f"{STAMP} {hashlib.sha256(repr(state).encode()).hexdigest()}"

    def is_sound(rows: Rows) -> np.bool_:
        kind, shard, label = rows["kind"], rows["shard"], rows["label"]
        known = (shard >= 0) & (shard < len(shards)) & (label >= NO_LABEL) & (label <= MAX_LABEL)
        known &= (kind >= IMAGE) & (kind <= OTHER)
        known &= (kind != IMAGE) | (label < (kind == CLASS).sum())
        known &= (kind != OTHER) | ((label >= 0) & (label < len(LEFT_OUT)))
        return np.all(known & (rows["offset"] >= 0) & (rows["size"] >= 0))

    with folder_lock(folder):
        saved = load_table(folder, part, stamp, ROW, is_sound)
        if saved is not None:
            names = map(os.fsdecode, saved.names)
            return _from_rows(zip(names, saved.rows.tolist(), strict=True))
        with ThreadPoolExecutor(THREADS) as pool:
            listing = _joined(shards, list(pool.map(list_shard, shards)))
        named = [
            *((m.name, (IMAGE, *m[1:])) for m in listing.members),
            *((name, (CLASS, 0, 0, 0, k)) for k, name in enumerate(listing.classes)),
            *((name, (OTHER, 0, 0, 0, LEFT_OUT.index(why))) for name, why in listing.left_out),
        ]
        rows = np.array([row for _, row in named], ROW)
        save_table(folder, part, stamp, [name for name, _ in named], rows)
    return listing


def _from_rows(named: Iterator[tuple[str, tuple[int, ...]]]) -> Listing:
    listing = Listing([], [], [])
    for name, (kind, shard, offset, size, label) in named:
        if kind == IMAGE:
            listing.members.append(Member(name, shard, offset, size, label))
        elif kind == CLASS:
            listing.classes.append(name)
        else:
            listing.left_out.append((name, LEFT_OUT[label]))
    return listing


def _joined(shards: Sequence[Path], found: Sequence[Shard]) -> Listing:
    """All shards as one, with their labels as numbers; names are numbered in their order."""
    given = {label for shard in found for _, label in shard.images if label != NO_LABEL}
    if any(isinstance(label, str) for label in given):
        classes = sorted({str(label) for label in given})
    else:
        classes = [str(k) for k in range(max(map(int, given), default=NO_LABEL) + 1)]
    number = {name: k for k, name in enumerate(classes)}
    members = [
        member._replace(shard=k, label=number.get(str(label), NO_LABEL))
        for k, shard in enumerate(found)
        for member, label in shard.images
    ]
    left_out = [
        (f"{path.name}/{name}", why)
        for path, shard in zip(shards, found, strict=True)
        for name, why in shard.left_out
    ]
    return Listing(members, classes, left_out)


LONG = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
"""Members that say something of the next one."""


class _Header(tarfile.TarInfo):
    """A header whose long names and attributes are bounded: tarfile reads them whole."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in LONG and self.size > LABEL_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def list_shard(path: Path) -> Shard:
    """The images of one shard, in its order, as members of shard 0.

    Raises:
        DataError: it is damaged or compressed.
    """
    images: list[tuple[tuple[str, str], Member]] = []
    labels: dict[str, int | str] = {}
    left_out: list[tuple[str, str]] = []
    try:
        with tarfile.open(path, "r:", tarinfo=_Header) as tar:
            end = path.stat().st_size
            for file in tar:
                if file.offset_data + file.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                keys, suffix = _keys(file.name)
                if why := _why_not(file, suffix):
                    left_out.append((file.name, why))
                elif not file.isreg() or file.sparse is not None or _is_hidden(file.name):
                    continue
                elif suffix in SUFFIXES:
                    member = Member(file.name, 0, file.offset_data, file.size, NO_LABEL)
                    images.append((keys, member))
                elif suffix in (".cls", ".json"):
                    stream = tar.extractfile(file)
                    assert stream is not None  # it is a regular file
                    text = stream.read(LABEL_BYTES + 1)
                    label = _label(text, suffix) if len(text) <= LABEL_BYTES else None
                    if label is None:
                        left_out.append((file.name, BAD_LABEL))
                    elif suffix == ".cls" or keys[-1] not in labels:
                        labels[keys[-1]] = label
            assert tar.fileobj is not None  # it is open
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes it for the end
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} is damaged or not an uncompressed tar file ({message_of(error)}): "
            "fetch or pack it again"
        ) from error
    samples = {first for (first, last), _ in images if first == last}
    used: list[tuple[Member, int | str]] = []
    for (first, last), member in images:
        if first != last and first in samples:
            left_out.append((member.name, FURTHER))
        else:
            used.append((member, labels.get(last, labels.get(first, NO_LABEL))))
    return Shard(used, left_out)


def _keys(name: str) -> tuple[tuple[str, str], str]:
    """The name up to the first and to the last point of its file's name, and the last suffix."""
    folder, _, file = name.rpartition("/")
    stem, suffix = os.path.splitext(file)
    return (f"{folder}/{file.partition('.')[0]}", f"{folder}/{stem}"), suffix.lower()


def _is_hidden(name: str) -> bool:
    return any(is_litter(part) for part in name.split("/") if part not in ("", ".", ".."))


def _why_not(file: tarfile.TarInfo, suffix: str) -> str:
    """Why a member that looks like an image is not used; empty for any other member."""
    if suffix in NOT_READ and suffix not in SUFFIXES:
        return UNREAD
    if not is_image(file.name) or file.isdir():
        return ""
    if _is_hidden(file.name):
        return HIDDEN
    return "" if file.isreg() and file.sparse is None else LINK


def _label(text: bytes, suffix: str) -> int | str | None:
    """The label in a .cls or .json member; NO_LABEL if it has none, None if it is no label."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        if suffix == ".json":
            return None
        value = text.decode("utf-8-sig", errors="replace")
    if suffix == ".json":
        if not isinstance(value, dict):
            return None
        given = (value[key] for key in ("label", "cls") if value.get(key) is not None)
        value = next(given, None)
    if value is None:
        return NO_LABEL
    if isinstance(value, str):
        value = class_name(value.strip())
        number = value.removeprefix("-")
        if not (number.isascii() and number.isdigit()):
            is_name = value.isprintable() and "\ufffd" not in value
            return value if is_name and 0 < len(value) <= LONGEST_NAME else None
        value = int(value) if len(value) < LONGEST_NAME else MAX_LABEL + 1
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and NO_LABEL <= value <= MAX_LABEL else None
