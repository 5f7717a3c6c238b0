"""The images in tar files, as WebDataset packs them: where each lies, and its label.

A member is an image by its suffix, what follows the first point of its name. What stands before
that is its key; the label is a whole number in the member KEY.cls, or under `label` or `cls` in
KEY.json. Members of other suffixes, and those whose names start with a point, are ignored.
"""

import io
import itertools
import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rdm_fast.data.images import index
from rdm_fast.data.images.decode import one_line
from rdm_fast.data.images.folder import SUFFIXES
from rdm_fast.data.images.index import Arrays
from rdm_fast.errors import DataError

FORMAT = 1
LABEL_BYTES = 1 << 20
NO_LABEL = -1
MAX_LABEL = (1 << 20) - 1  # a class has a name in memory
THREADS = 8


class Member(NamedTuple):
    """An image in a shard."""

    name: str
    offset: int
    """Place of its first byte in the shard."""
    size: int
    """Bytes."""
    label: int


Members = list[Member]


class Slice(io.RawIOBase):
    """A member of a shard as a file, read only where it is asked for."""

    def __init__(self, shard: Path, member: Member) -> None:
        self._start, self._size, self._at = member.offset, member.size, 0
        self._file = open(shard, "rb", buffering=0)  # noqa: SIM115

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


def list_members(shards: Sequence[Path], part: str) -> list[Members]:
    """The images of each shard, listed or recalled from an earlier listing.

    Args:
        shards: tar files of one folder.
        part: tells these from other shards there.

    Raises:
        DataError: a shard is damaged, or a label is no number.
    """
    folder, part = shards[0].parent, f"{part}-members"
    state = np.array([(s.stat().st_size, s.stat().st_mtime_ns) for s in shards], np.int64)
    with index.alone(folder):
        saved = index.recall_arrays(folder, part, _is_sound)
        if saved is not None and np.array_equal(saved["state"], state):
            return _unpack(saved)
        with ThreadPoolExecutor(THREADS) as pool:
            members = list(pool.map(scan, shards))
        names = [os.fsencode(member.name) for own in members for member in own]
        numbers = [member[1:] for own in members for member in own]
        index.save_arrays(
            folder,
            part,
            {
                "format": np.array(FORMAT),
                "state": state,
                "counts": np.array([*map(len, members)], np.int64),
                "paths": np.frombuffer(b"".join(names), np.uint8),
                "ends": np.cumsum([0, *map(len, names)], dtype=np.int64),
                "numbers": np.array(numbers, np.int64).reshape(-1, 3),
            },
        )
    return members


def scan(shard: Path) -> Members:
    """The images of a shard, in its order.

    Raises:
        DataError: it is damaged or compressed, or a label is no number.
    """
    images: list[tuple[str, Member]] = []
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            end = shard.stat().st_size
            for file in tar:
                if file.offset_data + file.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                folder, _, name = file.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key, suffix = f"{folder}/{stem}", f".{suffix.lower()}"
                if not stem or not file.isreg() or file.sparse is not None:
                    continue
                if suffix in SUFFIXES:
                    member = Member(file.name, file.offset_data, file.size, NO_LABEL)
                    images.append((key, member))
                elif suffix in (".cls", ".json") and file.size <= LABEL_BYTES:
                    stream = tar.extractfile(file)
                    assert stream is not None  # it is a regular file
                    label = _label(stream.read(), suffix, f"{shard}/{file.name}")
                    if suffix == ".cls" or key not in labels:
                        labels[key] = label
            assert tar.fileobj is not None  # it is open
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes it for the end
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{shard} is damaged or not an uncompressed tar file ({str(error).splitlines()[0]}): "
            "fetch or pack it again"
        ) from error
    return [member._replace(label=labels.get(key, NO_LABEL)) for key, member in images]


def _label(text: bytes, suffix: str, name: str) -> int:
    """The label in a .cls or .json member; NO_LABEL if the latter says none.

    Raises:
        DataError: it is there and no whole number from 0.
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


def _unpack(arrays: Arrays) -> list[Members]:
    rows = zip(index.split(arrays), arrays["numbers"].tolist(), strict=True)
    members = [Member(os.fsdecode(name), *numbers) for name, numbers in rows]
    ends = np.cumsum([0, *arrays["counts"].tolist()]).tolist()
    return [members[a:b] for a, b in itertools.pairwise(ends)]


def _is_sound(arrays: Arrays) -> bool:
    """Whether the arrays fit together: the file may be somebody else's."""
    numbers: NDArray[np.int64] = arrays["numbers"]
    ends, counts = arrays["ends"], arrays["counts"]
    return bool(
        arrays["format"] == FORMAT
        and all(arrays[k].dtype == np.int64 for k in ("state", "counts", "ends", "numbers"))
        and arrays["paths"].dtype == np.uint8
        and numbers.shape == (len(ends) - 1, 3)
        and (numbers[:, :2] >= 0).all()
        and (numbers[:, 2] >= NO_LABEL).all()
        and (numbers[:, 2] <= MAX_LABEL).all()
        and len(counts) == len(arrays["state"])
        and (counts >= 0).all()
        and counts.sum() == len(numbers)
        and (np.diff(ends) > 0).all()
        and (ends[0], ends[-1]) == (0, len(arrays["paths"]))
    )
