"""What DALI is fed with: encoded images, and the windows of their views. Needs no DALI.

Files are read, and parameters drawn, in threads some steps ahead.

DALI's decoders give Pillow's pixels for JPEG and 8-bit PNG files. Every other kind is decoded by
Pillow and handed over as PPM, so that an image is the same in every loader.
"""

from collections.abc import Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rdm_fast.config import Config
from rdm_fast.data.images.bad_files import read_or_next
from rdm_fast.data.images.sets import ImageSet, Pixels
from rdm_fast.data.loaders.batch import draw_all_views
from rdm_fast.data.views.sampler import ViewParameters, epoch_order, step_indices
from rdm_fast.errors import DataError, UserError

Indices = NDArray[np.int64]
Drawn = list[ViewParameters]
"""Of each view of some images."""
_Read = list[tuple[int, Pixels]]
"""Images with their indices."""

JPEG = b"\xff\xd8"
PNG = b"\x89PNG\r\n\x1a\n"
PNG_DEPTH = 24  # place of the number of bits of a sample in a PNG file
READ_AHEAD = 3  # steps, beyond the two of DALI's own queue
READERS = 8  # threads: they wait for a disk or a network more than they work


class Fed(NamedTuple):
    """What DALI was given for a step."""

    indices: Indices
    """The images: those asked for, but for unreadable ones."""
    drawn: Drawn


class Source:
    """What DALI asks for its input, step after step of an epoch; this rank's part.

    An image that cannot be read is replaced as in every loader (`bad_files.read_or_next`).
    """

    def __init__(
        self, config: Config, images: ImageSet, rank: int, world_size: int, by_pillow: Set[int]
    ) -> None:
        """`by_pillow`: images whose files DALI cannot decode; it is given Pillow's pixels."""
        self._config, self._images = config, images
        self._rank, self._world_size = rank, world_size
        self.steps_per_epoch = len(images) // config.optim.global_batch
        self.local_batch = config.optim.local_batch(world_size)
        self._by_pillow = by_pillow
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="rdm-reader")
        self.plan(0, 0)

    def plan(self, epoch: int, start: int) -> None:
        """Begin an epoch at step `start`."""
        self._epoch, self._start = epoch, start
        self._order = epoch_order(self._config.seed, epoch, len(self._images))
        self._ahead: dict[int, tuple[list[Future[_Read]], Future[Drawn]]] = {}
        self._fed: dict[int, Fed] = {}
        self._refused: UserError | None = None

    def asked(self, step: int) -> Indices:
        """This rank's images of a step of the epoch."""
        batch = self._config.optim.global_batch
        return step_indices(self._order, step, batch, self._rank, self._world_size)

    def fed(self, step: int) -> Fed:
        """What DALI was given for a step; once."""
        return self._fed.pop(step)

    def refusal(self) -> UserError | None:
        """Why DALI was given nothing more, if that is not the epoch's end."""
        return self._refused

    def __call__(self, info: Any) -> list[Any]:
        """Images of the step after those already asked for, and where their windows are."""
        step = self._start + info.iteration
        if step >= self.steps_per_epoch:
            raise StopIteration
        for ahead in range(step, min(step + READ_AHEAD, self.steps_per_epoch)):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._read(ahead)
        parts, drawing = self._ahead.pop(step)
        try:
            read = [image for part in parts for image in part.result()]
        except UserError as error:  # told when its turn comes: DALI is steps ahead
            self._refused = error
            raise StopIteration from None
        shown, asked = np.array([i for i, _ in read]), self.asked(step)
        drawn = drawing.result() if (shown == asked).all() else self._draw(shown)
        self._fed[step] = Fed(shown, drawn)
        return [[file for _, file in read], *(array for p in drawn for array in window(p))]

    def _read(self, step: int) -> tuple[list["Future[_Read]"], "Future[Drawn]"]:
        """A step's input, under way: images in some parts, and what is drawn."""
        indices, submit = self.asked(step), self._readers.submit
        parts = np.array_split(indices, min(READERS, len(indices)))
        return [submit(self._files, part) for part in parts], submit(self._draw, indices)

    def _files(self, indices: Indices) -> "_Read":
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

    def _draw(self, indices: Indices) -> Drawn:
        return draw_all_views(self._config, self._images, self._epoch, indices)


def window(p: ViewParameters) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Corner and sides of each image's window, [B, 2] each."""
    corner, sides = np.stack((p.top, p.left), axis=-1), np.stack((p.height, p.width), axis=-1)
    return corner.astype(np.int32), sides.astype(np.int32)


def file_for_dali(images: ImageSet, i: int) -> Pixels:
    """Image i as a file that DALI decodes to the pixels that Pillow gives, [n] bytes.

    Raises:
        DataError: it cannot be read, or not be decoded by Pillow if that is needed.
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
