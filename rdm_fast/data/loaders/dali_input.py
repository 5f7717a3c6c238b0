"""DALI's input: encoded images, and the windows of their views. Needs no DALI.

Threads read files and draw parameters some steps ahead.

DALI's decoders give Pillow's pixels for JPEG and 8-bit PNG files. Every other kind is decoded by
Pillow and handed over as PPM, so that an image is the same in every loader.
"""

from collections import deque
from collections.abc import Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rdm_fast.config import Config
from rdm_fast.data.images.bad_files import read_or_next
from rdm_fast.data.images.sets import ImageSet, Pixels
from rdm_fast.data.loaders.batch import Indices, draw_all_views
from rdm_fast.data.views.sampler import ViewParameters
from rdm_fast.errors import DataError, UserError

JPEG = b"\xff\xd8"
PNG = b"\x89PNG\r\n\x1a\n"
PNG_DEPTH = 24  # place of the number of bits of a sample in a PNG file
READ_AHEAD = 3  # steps, beyond the two of DALI's own queue
READERS = 8  # threads: they wait for a disk or a network more than they work


class Fed(NamedTuple):
    """The images that DALI was given for a step."""

    indices: Indices
    """Those asked for, but for unreadable ones."""
    drawn: list[ViewParameters]


_Read = list[tuple[int, Pixels]]
"""Images with their indices."""


class Source:
    """DALI's callback for its input, step after step of an epoch.

    An image that cannot be read is replaced as in every loader (`bad_files.read_or_next`).
    """

    def __init__(self, config: Config, images: ImageSet, by_pillow: Set[int]) -> None:
        """`by_pillow`: images whose files DALI cannot decode; it is given Pillow's pixels."""
        self._config, self._images, self._by_pillow = config, images, by_pillow
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="rdm-reader")
        self.plan(0, [])

    def plan(self, epoch: int, steps: Sequence[Indices]) -> None:
        """Begin these steps of an epoch; each is a batch of images."""
        self._epoch, self._steps = epoch, deque(steps)
        self._ahead: deque[tuple[Indices, list[Future[_Read]], Future[list[ViewParameters]]]]
        self._ahead = deque()  # images asked for; read, in parts; drawn
        self.fed: deque[Fed] = deque()
        """Of the steps that DALI was given, oldest first."""
        self.error: UserError | None = None
        """Why DALI was given no more steps, if not because the epoch ended."""

    def __call__(self) -> list[Any]:
        """The next step's images, then the corner and sides of each view's windows."""
        while self._steps and len(self._ahead) < READ_AHEAD:
            self._read_ahead(self._steps.popleft())
        if not self._ahead:
            raise StopIteration
        asked, parts, drawing = self._ahead.popleft()
        try:
            read = [image for part in parts for image in part.result()]
        except UserError as error:  # raised when the step's turn comes: DALI is steps ahead
            self.error = error
            raise StopIteration from None
        shown = np.array([i for i, _ in read])
        drawn = drawing.result() if (shown == asked).all() else self._draw(shown)
        self.fed.append(Fed(shown, drawn))
        return [[file for _, file in read], *(array for p in drawn for array in window(p))]

    def _read_ahead(self, indices: Indices) -> None:
        submit, parts = self._readers.submit, np.array_split(indices, min(READERS, len(indices)))
        reading = [submit(self._files, part) for part in parts]
        self._ahead.append((indices, reading, submit(self._draw, indices)))

    def _files(self, indices: Indices) -> _Read:
        if self._images.pixels is not None:
            return list(zip(indices.tolist(), self._images.pixels[indices], strict=True))
        return [self._file(i) for i in indices.tolist()]

    def _file(self, i: int) -> tuple[int, Pixels]:
        """Image i, or the one in its place, as a file."""
        if i not in self._by_pillow:
            with suppress(DataError):
                return i, file_for_dali(self._images, i)
        shown, pixels = read_or_next(self._images, i, self._config.data)
        return shown, as_ppm(pixels)

    def _draw(self, indices: Indices) -> list[ViewParameters]:
        return draw_all_views(self._config, self._images, self._epoch, indices)


def window(p: ViewParameters) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Corner and sides of each image's window, [B, 2] each."""
    corner, sides = np.stack((p.top, p.left), axis=-1), np.stack((p.height, p.width), axis=-1)
    return corner.astype(np.int32), sides.astype(np.int32)


def file_for_dali(images: ImageSet, i: int) -> Pixels:
    """Image i as a file that DALI decodes to the pixels that Pillow gives, [n] bytes.

    Raises:
        DataError: it cannot be read, or Pillow has to decode it and cannot.
    """
    file = images.file(i)
    head = file[: PNG_DEPTH + 1].tobytes()
    if head.startswith(JPEG) or (head.startswith(PNG) and head[PNG_DEPTH:] <= b"\x08"):
        return file
    return as_ppm(images.read(i))


def as_ppm(pixels: Pixels) -> Pixels:
    """[H, W, 3] as a file that needs no decoding, [n] bytes."""
    header = f"P6 {pixels.shape[1]} {pixels.shape[0]} 255\n".encode()
    return np.concatenate((np.frombuffer(header, np.uint8), pixels.reshape(-1)))
