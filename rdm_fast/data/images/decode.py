"""Inspect and decode one image file with Pillow.

Every file becomes 8-bit RGB in one way, the same for every loader:

    grey, 1 bit, palette, CMYK, YCbCr    as Pillow converts them
    transparency                         dropped: the colors beneath it stay, on no background
    16 bits a channel                    the high byte, of grey (Pillow would clip) as of RGB; or
                                         grey as a share of data.white_level
    animations                           the first frame
    EXIF orientation                     not applied

Files are not trusted: only the formats listed here are tried, by content and not by name, and
nothing is decoded whose header claims more than MAX_PIXELS.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from rdm_fast.errors import DataError, message_of, printable
from rdm_fast.runtime import atomic_files

Pixels = NDArray[np.uint8]

Image.init()  # loads Pillow's formats, which threads should not do at the same time
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else it prints lines of its own
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
FORMATS = tuple(form for form in _WANTED if form in Image.OPEN)
"""Not all that Pillow knows: it would hand EPS to Ghostscript."""
SUFFIXES = tuple(sorted(end for end, form in Image.EXTENSION.items() if form in (*FORMATS, "MPO")))
"""Of files in these formats, in lower case. MPO is a JPEG of several pictures."""
BANDS = 277  # TIFF's tag SamplesPerPixel
MOST_BANDS = 4
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
SIXTEEN_BIT_AS_32 = ("PNG", "PPM")
"""Formats whose 16-bit grey Pillow holds as mode I; that mode is 32 bits deep elsewhere."""
WHITE = 65535
"""The largest value of 16 bits."""
MAX_PIXELS = 178_956_970
"""Pillow's own limit for a decompression bomb."""
LARGE = 16_000_000
"""Images of this many pixels are inspected one at a time: eight threads could fill the memory."""
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB\x60\x82", "GIF": b";"}

_one_large = threading.Lock()


class ImageSize(NamedTuple):
    """Pixels, as a file's header says."""

    height: int
    width: int


def inspect_image(source: Path | BinaryIO, *, full: bool) -> ImageSize | str:
    """The size of an image file, or in a few words why it cannot be used.

    Args:
        source: the file, or its bytes.
        full: decode it, too. By default a file is decoded only if it does not end as its format
            does: that finds truncated files, but no damage in the middle.
    """
    try:
        with _opened(source) as file, _image(file) as image:
            width, height = image.size
            if full or not _ends_whole(file, str(image.format)):
                with _one_large if width * height >= LARGE else nullcontext():
                    image.load()
            return ImageSize(height, width)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file may raise anything, from any depth of a codec
        return reason(error)


def decode(source: Path | BinaryIO, name: str, white_level: int = WHITE) -> Pixels:
    """The image as 8-bit RGB, [H, W, 3]; `white_level` of 16-bit grey becomes 255.

    Raises:
        DataError: it is missing, damaged, too large or unsupported; the message calls it `name`.
    """
    try:
        with _opened(source) as file, _image(file) as image:
            if not image.mode.startswith("I"):
                return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
            grey = np.asarray(image)
            if white_level == WHITE:
                grey = grey >> 8
            else:
                grey = (np.minimum(grey, white_level) * 255.0 / white_level).round()
            return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    except MemoryError:
        raise
    except Exception as error:
        raise unreadable(name, reason(error)) from error


def largest_value(source: BinaryIO) -> tuple[int | None, bool]:
    """The largest value of an image of 16 bits a channel, None for another, and whether it is grey.

    Of color, Pillow keeps the high byte, so the value is the largest with that byte.
    """
    with suppress(Exception), _image(source) as image:  # a damaged file raises anything
        is_grey = image.mode.startswith("I")
        if is_grey:
            return int(np.asarray(image).max()), True
        if ";16" in repr(getattr(image, "tile", "")):  # how Pillow names what it unpacks
            return 256 * int(np.asarray(image).max()) + 255, False
    return None, False


def read_file(path: Path, name: str, offset: int = 0, size: int = -1) -> bytes:
    """Bytes of a file: `size` of them from `offset` on, or all.

    Raises:
        DataError: it cannot be read, or is no regular file; the message calls it `name`.
    """
    try:
        with _opened(path) as file:
            file.seek(offset)
            return file.read(size)
    except (OSError, ValueError) as error:
        raise unreadable(name, reason(error)) from error


def unreadable(name: str, why: str) -> DataError:
    """The error for an image that cannot be read or decoded."""
    return DataError(f"{name} cannot be read as an image ({why})")


def reason(error: Exception) -> str:
    """Why a library or the operating system refused a file, in a few words on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or a damaged header"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return message_of(error)


def one_line(path: str) -> str:
    r"""A path in a message or table, which can be read back: \\ is escaped, too."""
    return printable(path.replace("\\", r"\\"))


@contextmanager
def _opened(source: Path | BinaryIO) -> Iterator[BinaryIO]:
    """Open a path and close it after use; leave an open file as it is."""
    if not isinstance(source, Path):
        yield source
        return
    with atomic_files.opened(source) as file:
        yield file


def _image(file: BinaryIO) -> Image.Image:
    """The file's image, not decoded yet.

    Raises:
        ValueError: it is empty or too large, or its mode has no one meaning in 8-bit RGB.
    """
    if not file.seek(0, os.SEEK_END):
        raise ValueError("empty")
    file.seek(0)
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        if (bands := _tiff_bands(file)) > MOST_BANDS:
            raise ValueError(
                f"TIFF of {bands} bands, and only 1, 3 or {MOST_BANDS} are an image here"
            ) from None
        raise
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"more than {MAX_PIXELS} pixels")
    if image.mode not in (*EIGHT_BIT, *SIXTEEN_BIT) and not (
        image.mode == "I" and image.format in SIXTEEN_BIT_AS_32
    ):
        raise ValueError(f"{image.format} of mode {image.mode}, which is not supported")
    return image


def _tiff_bands(file: BinaryIO) -> int:
    """Channels that a TIFF's header claims; 0 if it has none that can be read."""
    with suppress(Exception):  # Pillow raises many kinds for a damaged header
        file.seek(0)
        directory = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(directory.next)
        directory.load(file)
        return int(directory[BANDS])
    return 0


def _ends_whole(file: BinaryIO, form: str) -> bool:
    """Whether the file ends as its format does; False for formats without an end mark."""
    if form == "WEBP":
        return True  # opening one reads all of it
    end = ENDS.get(form)
    if end is None or file.seek(0, os.SEEK_END) < len(end):
        return False
    file.seek(-len(end), os.SEEK_END)  # Pillow goes back by itself
    return file.read() == end
