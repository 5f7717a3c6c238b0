"""The images in tar files, as WebDataset packs them: where each lies, and its label.

A member is an image by its suffix: all that follows the first point of its name. What stands before
that point is its key. Its label is a whole number in the member KEY.cls, or under `label` or `cls`
in KEY.json. Members with other suffixes, and names that start with a point, are ignored.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rdm_fast.data.images.decode import one_line
from rdm_fast.data.images.folder import SUFFIXES
from rdm_fast.data.images.tables import Rows, folder_lock, load_table, save_table
from rdm_fast.errors import DataError, message_of

STAMP = "members 2"  # changes with the format
LABEL_BYTES = 1 << 20
NO_LABEL = -1
MAX_LABEL = (1 << 20) - 1  # each class has a name in memory
THREADS = 8


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


ROW = np.dtype([(name, "<i8") for name in Member._fields[1:]])


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


def list_members(shards: Sequence[Path], part: str) -> list[Member]:
    """The images of the shards in order, listed now or recalled from an earlier listing.

    Args:
        shards: tar files of one folder.
        part: tells these from other shards there.

    Raises:
        DataError: a shard is damaged, or a label is no number.
    """
    folder, part = shards[0].parent, f"{part}-members"
    state = [(s.stat().st_size, s.stat().st_mtime_ns) for s in shards]
    stamp = f"{STAMP} {hashlib.sha256(repr(state).encode()).hexdigest()}"

    def is_sound(rows: Rows) -> np.bool_:
        shard, label = rows["shard"], rows["label"]
        known = (shard >= 0) & (shard < len(shards)) & (label >= NO_LABEL) & (label <= MAX_LABEL)
        return np.all(known & (rows["offset"] >= 0) & (rows["size"] >= 0))

    with folder_lock(folder):
        saved = load_table(folder, part, stamp, ROW, is_sound)
        if saved is not None:
            rows = zip(saved.names, saved.rows.tolist(), strict=True)
            return [Member(os.fsdecode(name), *numbers) for name, numbers in rows]
        with ThreadPoolExecutor(THREADS) as pool:
            listed = enumerate(pool.map(list_shard, shards))
            members = [member._replace(shard=k) for k, found in listed for member in found]
        names = [member.name for member in members]
        save_table(folder, part, stamp, names, np.array([m[1:] for m in members], ROW))
    return members


def list_shard(path: Path) -> list[Member]:
    """The images of one shard, in its order, as members of shard 0.

    Raises:
        DataError: it is damaged or compressed, or a label is no number.
    """
    images: list[tuple[str, Member]] = []
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            end = path.stat().st_size
            for file in tar:
                if file.offset_data + file.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                folder, _, name = file.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key, suffix = f"{folder}/{stem}", f".{suffix.lower()}"
                if not stem or not file.isreg() or file.sparse is not None:
                    continue
                if suffix in SUFFIXES:
                    member = Member(file.name, 0, file.offset_data, file.size, NO_LABEL)
                    images.append((key, member))
                elif suffix in (".cls", ".json") and file.size <= LABEL_BYTES:
                    stream = tar.extractfile(file)
                    assert stream is not None  # it is a regular file
                    label = _label(stream.read(), suffix, f"{path}/{file.name}")
                    if suffix == ".cls" or key not in labels:
                        labels[key] = label
            assert tar.fileobj is not None  # it is open
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes it for the end
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path} is damaged or not an uncompressed tar file ({message_of(error)}): "
            "fetch or pack it again"
        ) from error
    return [member._replace(label=labels.get(key, NO_LABEL)) for key, member in images]


def _label(text: bytes, suffix: str, name: str) -> int:
    """The label in a .cls or .json member; NO_LABEL if the latter has none.

    Raises:
        DataError: it is not a whole number from 0.
    """
    try:
        value = json.loads(text)
        if suffix == ".json":
            value = value.get("label", value.get("cls", NO_LABEL))
        if type(value) is int and NO_LABEL <= value <= MAX_LABEL:
            return value
    except (ValueError, AttributeError):
        value = text[:40].decode(errors="replace")
    raise DataError(
        f"{one_line(name)} has the label {value!r}: give a whole number from 0 to {MAX_LABEL}"
    )
