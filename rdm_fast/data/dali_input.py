"""What DALI is fed with: encoded images, and the drawn parameters as arrays. Needs no DALI.

Files are read, and parameters drawn, in threads some steps ahead.

DALI's decoders give Pillow's pixels for JPEG and 8-bit PNG files. Every other kind is decoded by
Pillow and handed over as PPM, so that an image is the same in every loader.
"""

from collections.abc import Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdm_fast.config import Config, ViewConfig
from rdm_fast.data.augment import blur_taps
from rdm_fast.data.bad_files import read_or_next
from rdm_fast.data.batch import draw_all_views
from rdm_fast.data.images import ImageSet, Pixels
from rdm_fast.data.sampler import (
    HUE,
    JITTER_ORDERS,
    ViewParameters,
    epoch_order,
    step_indices,
)
from rdm_fast.errors import DataError, UserError

Indices = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]
_Read = list[tuple[int, Pixels]]
"""Images with their indices."""

NOTHING = -1
"""A round of jitter that leaves an image as it is."""
JPEG = b"\xff\xd8"
PNG = b"\x89PNG\r\n\x1a\n"
PNG_DEPTH = 24  # place of the number of bits of a sample in a PNG file
READ_AHEAD = 3  # steps, beyond the two of DALI's own queue
READERS = 8  # threads: they wait for a disk or a network more than they work


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
        self._ahead: dict[int, tuple[list[Future[_Read]], Future[list[Any]]]] = {}
        self._shown: dict[int, Indices] = {}
        self._refused: UserError | None = None

    def asked(self, step: int) -> Indices:
        """This rank's images of a step of the epoch."""
        batch = self._config.optim.global_batch
        return step_indices(self._order, step, batch, self._rank, self._world_size)

    def shown(self, step: int) -> Indices:
        """The images that DALI was given for a step: those asked for, but for unreadable ones."""
        return self._shown.pop(step)

    def refusal(self) -> UserError | None:
        """Why DALI was given nothing more, if that is not the epoch's end."""
        return self._refused

    def __call__(self, info: Any) -> list[Any]:
        """Images and arrays of the step after those already asked for."""
        step = self._start + info.iteration
        if step >= self.steps_per_epoch:
            raise StopIteration
        for ahead in range(step, min(step + READ_AHEAD, self.steps_per_epoch)):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._read(ahead)
        parts, arrays = self._ahead.pop(step)
        try:
            read = [image for part in parts for image in part.result()]
        except UserError as error:  # told when its turn comes: DALI is steps ahead
            self._refused = error
            raise StopIteration from None
        shown, asked = np.array([i for i, _ in read]), self.asked(step)
        self._shown[step] = shown
        as_asked = bool((shown == asked).all())
        return [[file for _, file in read], *(arrays.result() if as_asked else self._fed(shown))]

    def _read(self, step: int) -> tuple[list["Future[_Read]"], "Future[list[Any]]"]:
        """A step's input, under way: images in some parts, and all arrays."""
        indices, submit = self.asked(step), self._readers.submit
        parts = np.array_split(indices, min(READERS, len(indices)))
        return [submit(self._files, part) for part in parts], submit(self._fed, indices)

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

    def _fed(self, indices: Indices) -> list[Any]:
        return [array for view in self.arrays(self._epoch, indices) for array in view.values()]

    def arrays(self, epoch: int, indices: Indices) -> list[Arrays]:
        """The parameters of each view of some images, as the graph takes them."""
        augment = self._config.augment
        drawn = draw_all_views(self._config, self._images, epoch, indices)
        return [
            arrays_of(p, view, size=size, channels=augment.channels)
            for p, view, size in zip(drawn, augment.views, augment.sizes, strict=True)
        ]


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


# ---- the drawn parameters ---------------------------------------------------------------------


def arrays_of(p: ViewParameters, view: ViewConfig, *, size: int, channels: int) -> Arrays:
    """What the graph of a view must know of each image: arrays [B, ...], by name.

    A step that the configuration never takes has no array, and no place in the graph.
    """
    arrays: Arrays = {
        "corner": np.stack((p.top, p.left), axis=-1).astype(np.int32),
        "sides": np.stack((p.height, p.width), axis=-1).astype(np.int32),
    }
    if view.rotate or view.shear:
        arrays |= {"distort": (p.angle != 0) | (p.shear != 0), "matrix": _from_where(p, size)}
    if view.jitter:
        arrays |= {f"round{i}": x for i, x in enumerate(_jitter_rounds(p).T)}
        arrays |= {"brightness": _floats(p.brightness), "contrast": _floats(p.contrast)}
        if channels == 3:
            turn = np.trunc(p.hue * 255).astype(np.int64)
            arrays |= {"saturation": _floats(p.saturation), "turn": turn.astype(np.uint8)}
    if view.grey and channels == 3:
        arrays["grey"] = p.grey
    if view.blur:
        arrays |= {"blur": p.blur, "sigma": _floats(p.sigma), "window": _window(p.sigma, size)}
    if view.solarize:
        arrays["solarize"] = p.solarize
    arrays["flip"] = p.flip.astype(np.int32)
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _floats(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return values.astype(np.float32)


def _jitter_rounds(p: ViewParameters) -> NDArray[np.int32]:
    """Operation of each image in each round, [B, 4]."""
    rounds = np.where(p.jitter[:, None], JITTER_ORDERS[p.order], NOTHING)
    rounds[(rounds == HUE) & (p.hue == 0)[:, None]] = NOTHING  # no way through HSV for nothing
    return rounds.astype(np.int32)


def _window(sigma: NDArray[np.float64], size: int) -> NDArray[np.int32]:
    """Taps of each image's blur, [B]: four sigmas either way, beyond which lie less than 1e-4 of
    the weight, or a 60th of a level; and no more than other loaders take."""
    return np.minimum(blur_taps(size), 2 * np.ceil(4 * sigma) + 1).astype(np.int32)


def _from_where(p: ViewParameters, size: int) -> NDArray[np.float32]:
    """From a place in the view to the one from which rotation and shear bring it, [B, 2, 3]:
    torchvision's matrix inverted, about the centre."""
    angle, tangent = np.deg2rad(p.angle), np.tan(np.deg2rad(p.shear))
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array(((cos - sin * tangent, cos * tangent + sin), (-sin, cos))).transpose(2, 0, 1)
    centre = np.full((2, 1), size / 2)
    return _floats(np.concatenate((turn, centre - turn @ centre), axis=2))
