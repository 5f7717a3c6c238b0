"""Packed .npz files: decoded images, or encoded ones one after another. No pickle is read.

For each split `s` (train, test), either

    s_images  uint8 [N, H, W, C], C 1 or 3 (or [N, H, W])     decoded
or
    s_jpeg    uint8 [bytes]      image files (JPEG, PNG, ...) one after another
    s_offset  integer [N + 1]    image i is s_jpeg[s_offset[i]:s_offset[i + 1]]

and

    s_label   integer [N]        class, or -1 for none
    classes   str [K]            names of the classes, in label order

or no s_label, if the images have none.
"""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdm_fast.data.images.decode import WHITE, reason
from rdm_fast.data.images.deep_images import warn_of_range
from rdm_fast.data.images.folder import listing
from rdm_fast.data.images.sets import EncodedImages, ImageSet, PixelImages, decoded_once
from rdm_fast.errors import DataError, InputMissing
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.untrusted import require_array, require_zip

Array = NDArray[Any]

DAMAGED = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError)
"""numpy raises these for a file or array that it cannot read, pickled objects included."""


def load_arrays(path: Path, split: str, white_level: int = WHITE) -> ImageSet:
    """The train or test images of a packed file.

    Raises:
        InputMissing: there is no such file.
        DataError: it is damaged, or an array is missing or unlike the description above.
    """
    if not path.is_file():
        parent = next(parent for parent in path.absolute().parents if parent.is_dir())
        found = f"{path} is a folder that holds" if path.is_dir() else f"{parent} holds"
        raise InputMissing(
            f"--data.root {path} is not a file: data.name=arrays needs one .npz file; "
            f"{found} {listing(path if path.is_dir() else parent)}"
        )
    try:
        with atomic_files.opened(path) as file:
            is_zip = zipfile.is_zipfile(file)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason(error)}): check it") from error
    if not is_zip:  # numpy would take it for a pickle, and advise to load that
        raise DataError(f"{path} is not an .npz file, or damaged: pack the arrays with numpy.savez")
    require_zip(path)
    try:
        arrays = np.load(path, allow_pickle=False)
    except DAMAGED as error:
        raise DataError(f"{path} is damaged or not an .npz file ({reason(error)})") from error
    with arrays:
        return _read(_Arrays(arrays, path), split, white_level)


class _Arrays:
    """The arrays of a file, checked as they are read."""

    def __init__(self, arrays: Mapping[str, Array], path: Path) -> None:
        self.arrays, self.path = arrays, path

    def get(self, key: str, kinds: str, dimensions: tuple[int, ...], what: str) -> Array:
        """An array with one of these dtype.kinds and dimensions; `what` describes it."""
        if key not in self.arrays:
            raise DataError(
                f"{self.path} has no array {key} ({what}): it has {', '.join(sorted(self.arrays))}"
            )
        try:
            require_array(self.path, key)
            array = self.arrays[key]
        except DAMAGED as error:
            raise self.refuse(key, f"cannot be read ({reason(error)}), wanted {what}") from error
        if array.dtype.kind not in kinds or array.ndim not in dimensions:
            raise self.refuse(key, f"is {array.dtype} {list(array.shape)}, wanted {what}")
        return array

    def refuse(self, key: str, why: str) -> DataError:
        return DataError(f"{self.path}: array {key} {why}")


def _read(arrays: _Arrays, split: str, white_level: int) -> ImageSet:
    jpeg, offset, images, label = (f"{split}_{x}" for x in ("jpeg", "offset", "images", "label"))
    if images in arrays.arrays:
        pixels = arrays.get(images, "u", (3, 4), "uint8 [N, H, W, C]")
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        if pixels.dtype != np.uint8 or pixels.shape[3] not in (1, 3) or not pixels.size:
            shape = f"is {pixels.dtype} {list(pixels.shape)}"
            raise arrays.refuse(images, f"{shape}, wanted uint8 [N, H, W, C] with C 1 or 3")
        labels, classes = _labels(arrays, label, len(pixels))
        return PixelImages(pixels, labels, classes)
    encoded = arrays.get(jpeg, "u", (1,), f"uint8 [bytes], or {images}, uint8 [N, H, W, C]")
    offsets = arrays.get(offset, "iu", (1,), "integer [N + 1]").astype(np.int64)
    if encoded.dtype != np.uint8:
        raise arrays.refuse(jpeg, f"is {encoded.dtype}, wanted uint8")
    if len(offsets) < 2 or offsets[0] < 0 or offsets[-1] > len(encoded):
        raise arrays.refuse(offset, f"does not lie within the {len(encoded)} bytes of {jpeg}")
    if (np.diff(offsets) < 0).any():
        raise arrays.refuse(offset, f"falls after entry {int(np.argmax(np.diff(offsets) < 0))}")
    labels, classes = _labels(arrays, label, len(offsets) - 1)
    packed = EncodedImages(encoded, offsets, labels, classes, f"{arrays.path}:{jpeg}")
    packed.white_level = white_level
    warn_of_range(packed, f"{arrays.path}:{jpeg}")
    return decoded_once(packed)


def _labels(arrays: _Arrays, key: str, n: int) -> tuple[NDArray[np.int64] | None, list[str]]:
    mistaken = key not in arrays.arrays and any(name.startswith(key) for name in arrays.arrays)
    if key not in arrays.arrays and not mistaken:
        return None, []
    labels = arrays.get(key, "iu", (1,), "integer [N], -1 for no label").astype(np.int64)
    classes = arrays.get("classes", "U", (1,), "str [K], names in label order").tolist()
    if len(labels) != n:
        raise arrays.refuse(key, f"has {len(labels)} labels for {n} images")
    if labels.min() < -1 or labels.max() >= len(classes):
        found = f"from {labels.min()} to {labels.max()}"
        raise arrays.refuse(key, f"has labels {found}, but there are {len(classes)} classes")
    return labels, classes
