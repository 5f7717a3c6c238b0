"""A set of images, wherever its pixels are: in memory, encoded in memory, or in files.

Every way of reading gives the same pixels: Pillow decodes, and whatever the file holds (grey,
palette, CMYK, 16 bits, transparency) becomes 8-bit RGB by Pillow's `convert("RGB")`, which drops
transparency and cuts 16-bit grey off at 255. Of an animation the first frame is taken. EXIF
rotation is not applied.
"""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rdm_fast.errors import DataError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

SMALL = 96
"""Encoded images of one size and at most this many pixels a side are decoded once, for good."""
MAX_PIXELS = 89_478_485
"""Pillow's threshold of a decompression bomb (it warns there; here it is refused)."""
DECODE_THREADS = 8
BAD_IMAGE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
"""What Pillow raises for a damaged file: SyntaxError is its own for a broken PNG."""


class ImageSet(ABC):
    """Images in a fixed order, the same for every rank, loader and run."""

    pixels: Pixels | None = None
    """[N, H, W, C] if all images are decoded and of one size."""
    channels: int = 3

    def __init__(self, labels: Labels | None, classes: list[str], sizes: NDArray[np.int64]) -> None:
        self.labels = labels
        """[N] int64, -1 for an image without a label; None if none has one."""
        self.classes = classes
        """Names, in label order."""
        self.sizes = sizes
        """Height and width of every image, [N, 2]."""

    def __len__(self) -> int:
        return len(self.sizes)

    @abstractmethod
    def read(self, i: int) -> Pixels:
        """Image i, [H, W, C].

        Raises:
            DataError: the image cannot be decoded.
        """

    def file(self, i: int) -> Pixels:
        """The file of image i, undecoded, as bytes [n]; there is none if `pixels` is set.

        Raises:
            DataError: it cannot be read.
        """
        raise NotImplementedError

    def name(self, i: int) -> str:
        """What messages call image i."""
        return f"image {i}"

    @abstractmethod
    def _content(self, digest: "hashlib._Hash") -> None:
        """Feed the digest with what tells these images from others."""

    @cached_property
    def digest(self) -> str:
        """sha256 that tells this set from another, or from itself after a change.

        Of image files it covers names and sizes, not contents: reading all would take hours.
        """
        digest = hashlib.sha256(repr((len(self), self.channels, self.classes)).encode())
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        self._content(digest)
        return digest.hexdigest()


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
        headers = [self._header(i) for i in range(len(offsets) - 1)]
        sizes = _sizes_or_refuse(headers, lambda i: f"image {i} of {source}", f"in {source}")
        super().__init__(labels, classes, sizes)

    def file(self, i: int) -> Pixels:
        return self._encoded[self._offsets[i] : self._offsets[i + 1]]

    def name(self, i: int) -> str:
        return f"image {i} of {self._source}"

    def _header(self, i: int) -> "Size":
        return image_size(io.BytesIO(self.file(i).tobytes()))

    def read(self, i: int) -> Pixels:
        return decode(io.BytesIO(self.file(i).tobytes()), self.name(i))

    def _content(self, digest: "hashlib._Hash") -> None:
        digest.update(np.ascontiguousarray(self._offsets, dtype="<i8").data)
        digest.update(np.ascontiguousarray(self._encoded).data)

    def decoded(self) -> ImageSet:
        """Itself, or the same images decoded once if they are small and of one size."""
        side = int(self.sizes.max(initial=0))
        if not len(self) or side > SMALL or (self.sizes != self.sizes[0]).any():
            return self
        with ThreadPoolExecutor(min(DECODE_THREADS, os.cpu_count() or 1)) as pool:
            pixels = np.stack(list(pool.map(self.read, range(len(self)), chunksize=256)))
        return PixelImages(pixels, self.labels, self.classes)


class FileImages(ImageSet):
    """Image files, decoded when read."""

    def __init__(
        self, root: Path, paths: list[str], file_sizes: list[int], labels: Labels | None,
        classes: list[str],
    ) -> None:  # fmt: skip
        """`paths` are relative to `root`; `file_sizes` are in bytes, for the digest."""
        encoded = [os.fsencode(path) for path in paths]
        # One buffer, not a million objects, whose reference counts would copy it into each worker.
        self._paths = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._root, self._file_sizes = root, np.array(file_sizes, "<i8")
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            headers = list(pool.map(image_size, (root / path for path in paths)))
        sizes = _sizes_or_refuse(headers, lambda i: str(root / paths[i]), f"under {root}")
        super().__init__(labels, classes, sizes)

    def path(self, i: int) -> Path:
        """File of image i."""
        return self._root / os.fsdecode(self._paths[self._ends[i] : self._ends[i + 1]])

    def file(self, i: int) -> Pixels:
        try:
            return np.fromfile(self.path(i), np.uint8)
        except OSError as error:
            raise unreadable(self.name(i), error) from error

    def name(self, i: int) -> str:
        return str(self.path(i))

    def read(self, i: int) -> Pixels:
        return decode(self.path(i), self.name(i))

    def _content(self, digest: "hashlib._Hash") -> None:
        digest.update(self._paths)
        digest.update(self._ends.astype("<i8").data)
        digest.update(self._file_sizes.data)


Size = tuple[int, int] | str
"""Height and width, or why the image is unusable."""


def image_size(file: Path | io.BytesIO) -> Size:
    """Height and width from the header, without decoding; or why there are none."""
    try:
        with Image.open(file) as image:
            width, height = image.size
    except BAD_IMAGE as error:
        return "empty" if _is_empty(file) else _reason(error)
    if width * height > MAX_PIXELS:
        return f"{height} x {width} pixels are more than {MAX_PIXELS}"
    return height, width


def decode(file: Path | io.BytesIO, name: str) -> Pixels:
    """The image as 8-bit RGB, [H, W, 3].

    Raises:
        DataError: it is missing, damaged, or too large; the message calls it `name`.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{height} x {width} pixels are more than {MAX_PIXELS}")
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except BAD_IMAGE as error:
        raise unreadable(name, error) from error


def unreadable(name: str, error: Exception) -> DataError:
    """The sentence for an image that cannot be read or decoded."""
    return DataError(f"{name} cannot be read as an image ({_reason(error)})")


def _sizes_or_refuse(
    headers: list[Size], name: Callable[[int], str], where: str
) -> NDArray[np.int64]:
    bad = [i for i, header in enumerate(headers) if isinstance(header, str)]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(headers)} images {where} cannot be used; the first is "
            f"{name(bad[0])} ({headers[bad[0]]}): repair or remove them"
        )
    return np.array(headers, np.int64).reshape(-1, 2)


def _is_empty(file: Path | io.BytesIO) -> bool:
    if isinstance(file, io.BytesIO):
        return not file.getbuffer().nbytes
    return file.is_file() and file.stat().st_size == 0


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or a damaged header"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).splitlines()[0] if str(error) else type(error).__name__
