"""Sets of images: decoded in memory, encoded in memory, or in files.

All give the same pixels, those of `rdm_fast.data.images.decode`.
"""

import hashlib
import io
import math
import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rdm_fast.config import AugmentConfig
from rdm_fast.data.images.decode import (
    WHITE,
    decode,
    inspect_image,
    one_line,
    read_file,
    unreadable,
)
from rdm_fast.data.images.decode import Pixels as Pixels
from rdm_fast.data.images.index import Index
from rdm_fast.errors import ConfigMismatch, DataError, UsageError

Labels = NDArray[np.int64]

SMALL = 96
"""Encoded images of one size and at most this many pixels a side are decoded once."""
DECODE_THREADS = 8


class ImageSet(ABC):
    """Images in a fixed order, the same for every rank, loader and run."""

    pixels: Pixels | None = None
    """[N, H, W, C] if all images are decoded and of one size."""
    channels: int = 3
    bad_files: Path | None = None
    """The table that lists images that turn bad during training."""
    white_level: int = WHITE
    """What 16-bit grey images have as white."""

    def __init__(self, labels: Labels | None, classes: list[str], sizes: NDArray[np.int64]) -> None:
        self.labels = labels
        """[N] int64, -1 for an image without a label; None if none has one."""
        self.classes = classes
        """Names, in label order."""
        self.sizes = sizes
        """Height and width of every image, [N, 2]."""

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        return f"image {i}"

    def has_changed(self, i: int) -> bool:
        """Whether the file of image i was written to since it was inspected; False if unknown."""
        return False

    @abstractmethod
    def read(self, i: int) -> Pixels:
        """Image i, [H, W, C].

        Raises:
            DataError: the image cannot be decoded.
        """

    def file(self, i: int) -> Pixels:
        """The file of image i, undecoded, as bytes [n]; there is none if `pixels` is set.

        Raises:
            DataError: it cannot be read, or its header is not what it was.
        """
        raise NotImplementedError

    @abstractmethod
    def _content(self, digest: "hashlib._Hash") -> None:
        """Add to the digest the data that identify these images."""

    @cached_property
    def digest(self) -> str:
        """sha256 that identifies this set.

        It covers names and sizes of image files, not contents: reading all would take hours.
        """
        digest = hashlib.sha256(repr((len(self), self.channels, self.classes)).encode())
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        if self.white_level != WHITE:
            digest.update(str(self.white_level).encode())
        self._content(digest)
        return digest.hexdigest()

    def require_digest(self, digest: str | None, run: Path, root: str) -> None:
        """Refuse to resume a run that began with other images.

        Args:
            digest: of the images at its start; None if not known.
            run: its folder.
            root: --data.root, for the message.

        Raises:
            ConfigMismatch: the digests differ.
        """
        if digest not in (None, self.digest):
            raise ConfigMismatch(
                f"the images in --data.root {root} are not those that the run in {run} began with "
                f"(files or labels differ; now there are {len(self)} usable ones): put them back "
                "as they were, or start a new run with another --out"
            )


class PixelImages(ImageSet):
    """Decoded images of one size, in memory."""

    pixels: Pixels

    def __init__(self, pixels: Pixels, labels: Labels | None, classes: list[str]) -> None:
        n, height, width, self.channels = pixels.shape
        super().__init__(labels, classes, np.tile(np.array([[height, width]], np.int64), (n, 1)))
        self.pixels = np.ascontiguousarray(pixels)

    def read(self, i: int) -> Pixels:
        return self.pixels[i]

    def _content(self, digest: "hashlib._Hash") -> None:
        digest.update(repr(self.pixels.shape).encode())
        digest.update(self.pixels.data)


class EncodedImages(ImageSet):
    """Image files one after another in memory, decoded when read."""

    def __init__(
        self,
        encoded: Pixels,
        offsets: Labels,
        labels: Labels | None,
        classes: list[str],
        source: str,
    ) -> None:
        """Image i is encoded[offsets[i]:offsets[i + 1]]; `source` names them in messages."""
        self._encoded, self._offsets, self._source = encoded, offsets, source
        n = len(offsets) - 1
        found = [inspect_image(io.BytesIO(self.file(i).tobytes()), full=False) for i in range(n)]
        bad = [(i, why) for i, why in enumerate(found) if isinstance(why, str)]
        if bad:
            raise DataError(
                f"{len(bad)} of {n} images in {source} cannot be used; the first is "
                f"{self.name(bad[0][0])} ({bad[0][1]}): pack the file again without them"
            )
        sizes = [size for size in found if not isinstance(size, str)]
        super().__init__(labels, classes, np.array(sizes, np.int64).reshape(-1, 2))

    def file(self, i: int) -> Pixels:
        return self._encoded[self._offsets[i] : self._offsets[i + 1]]

    def name(self, i: int) -> str:
        return f"image {i} of {self._source}"

    def read(self, i: int) -> Pixels:
        return decode(io.BytesIO(self.file(i).tobytes()), self.name(i), self.white_level)

    def _content(self, digest: "hashlib._Hash") -> None:
        digest.update(np.ascontiguousarray(self._offsets, dtype="<i8").data)
        digest.update(np.ascontiguousarray(self._encoded).data)


class StoredImages(ImageSet):
    """Image files of an index, read and decoded one by one."""

    def __init__(self, index: Index, labels: Labels | None, classes: list[str]) -> None:
        """The usable images of an index; `labels` are those of all its files."""
        kept = np.flatnonzero(index.usable)
        files = [index.files[k] for k in kept.tolist()]
        encoded = [os.fsencode(file.path) for file in files]
        # One buffer, not a million objects, whose reference counts would copy it into each worker.
        self._paths = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._file_sizes = np.array([file.size for file in files], "<i8")
        self._written = np.array([file.changed for file in files], np.int64)
        super().__init__(None if labels is None else labels[kept], classes, index.sizes[kept])

    def indexed_path(self, i: int) -> str:
        """The path of image i in the index."""
        return os.fsdecode(self._paths[self._ends[i] : self._ends[i + 1]])

    @abstractmethod
    def _path(self, i: int) -> Path:
        """The file that holds image i."""

    def has_changed(self, i: int) -> bool:
        with suppress(OSError):  # it has vanished: reading it says so
            return self._path(i).stat().st_mtime_ns != int(self._written[i])
        return False

    @abstractmethod
    def _bytes(self, i: int) -> bytes:
        """The file of image i.

        Raises:
            DataError: it cannot be read.
        """

    def file(self, i: int) -> Pixels:
        data = self._bytes(i)
        size = inspect_image(io.BytesIO(data), full=False)  # 20 us; a decoder may be less strict
        if isinstance(size, str):
            raise unreadable(self.name(i), size)
        self._require_size(i, *size)
        return np.frombuffer(data, np.uint8)

    def read(self, i: int) -> Pixels:
        pixels = decode(io.BytesIO(self._bytes(i)), self.name(i), self.white_level)
        self._require_size(i, *pixels.shape[:2])
        return pixels

    def _require_size(self, i: int, height: int, width: int) -> None:
        H, W = self.sizes[i]
        if (height, width) != (H, W):
            raise DataError(
                f"{self.name(i)} has changed: it is {height} x {width} pixels, not {H} x {W}"
            )

    def _content(self, digest: "hashlib._Hash") -> None:
        digest.update(self._paths)
        digest.update(self._ends.astype("<i8").data)
        digest.update(self._file_sizes.data)


class FileImages(StoredImages):
    """Image files in a folder."""

    def __init__(self, root: Path, index: Index, labels: Labels | None, classes: list[str]) -> None:
        """The usable images of an index of `root`."""
        super().__init__(index, labels, classes)
        self._root = root

    def path(self, i: int) -> Path:
        """The file of image i."""
        return self._root / self.indexed_path(i)

    _path = path

    def name(self, i: int) -> str:
        return one_line(str(self.path(i)))

    def _bytes(self, i: int) -> bytes:
        return read_file(self.path(i), self.name(i))


def decoded_once(images: ImageSet, most: float = math.inf) -> ImageSet:
    """The same images, decoded now if they are small, of one size, and at most `most` bytes.

    Raises:
        DataError: one of them cannot be decoded.
    """
    n, side = len(images), int(images.sizes.max(initial=0))
    if not n or side > SMALL or (images.sizes != images.sizes[0]).any():
        return images
    if n * images.channels * int(images.sizes[0].prod()) > most:
        return images
    with ThreadPoolExecutor(min(DECODE_THREADS, os.cpu_count() or 1)) as pool:
        pixels = np.stack(list(pool.map(images.read, range(n), chunksize=256)))
    return PixelImages(pixels, images.labels, images.classes)


class Subset(ImageSet):
    """Some images of another set: image i is its image `indices[i]`."""

    def __init__(self, images: ImageSet, indices: NDArray[np.int64]) -> None:
        labels = None if images.labels is None else images.labels[indices]
        super().__init__(labels, images.classes, images.sizes[indices])
        self.images, self.indices, self.channels = images, indices, images.channels
        self.bad_files, self.white_level = images.bad_files, images.white_level
        self.pixels = None if images.pixels is None else images.pixels[indices]

    def read(self, i: int) -> Pixels:
        return self.images.read(int(self.indices[i]))

    def file(self, i: int) -> Pixels:
        return self.images.file(int(self.indices[i]))

    def has_changed(self, i: int) -> bool:
        return self.images.has_changed(int(self.indices[i]))

    def name(self, i: int) -> str:
        return self.images.name(int(self.indices[i]))

    def _content(self, digest: "hashlib._Hash") -> None:
        digest.update(self.images.digest.encode())
        digest.update(np.ascontiguousarray(self.indices).data)


def labeled(images: ImageSet, which: str) -> ImageSet:
    """The images with a label; `which` names the set in messages.

    Raises:
        DataError: there are none.
    """
    if images.labels is None or not (images.labels >= 0).any():
        raise DataError(
            f"the {which} images have no labels, which an accuracy needs: arrange image files as "
            "ROOT/train/<class>/ and ROOT/val/<class>/, give an .npz file train_label, test_label "
            "and classes, or name a Hugging Face column with --data.label-column"
        )
    with_label = np.flatnonzero(images.labels >= 0)
    return images if len(with_label) == len(images) else Subset(images, with_label)


def require_channels(images: ImageSet, augment: AugmentConfig, name: str) -> None:
    if images.channels != augment.channels:
        raise UsageError(
            f"--augment.mean and --augment.std have {augment.channels} channel(s), the images of "
            f"{name} have {images.channels}: give {images.channels} number(s) to both"
        )
