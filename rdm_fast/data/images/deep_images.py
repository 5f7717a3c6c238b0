"""Images of 16 bits a channel whose values fill part of the range, as those of a 12-bit camera.

Their high byte has few levels: 16 of 256 for 12 bits.
"""

import io

import numpy as np

from rdm_fast.data.images.decode import WHITE, largest_value
from rdm_fast.data.images.sets import ImageSet
from rdm_fast.errors import DataError
from rdm_fast.runtime.distributed import print0

LOOKED_AT = 16
"""Images, evenly spread, of which only 16-bit ones are decoded."""


def warn_of_range(images: ImageSet, source: str) -> None:
    """Warn of 16-bit images that use less than half of `images.white_level`, or exceed it.

    Args:
        images: with `file`.
        source: where they are, for the message.
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, LOOKED_AT).round().astype(np.int64))
    grey: list[int] = []
    color: list[int] = []
    for i in chosen.tolist():
        try:
            value, is_grey = largest_value(io.BytesIO(images.file(i).tobytes()))
        except DataError:  # it has turned bad since the index saw it; its reader will say so
            continue
        if value is not None:
            (grey if is_grey else color).append(value)
    white = images.white_level
    if grey and (max(grey) > white or 2 * max(grey) < white):
        level = 2 ** int(max(grey)).bit_length() - 1
        print0(
            f"warning: 16-bit grey images in {source} have values up to {max(grey)} (of "
            f"{len(grey)} looked at), and --data.white-level {white} is shown as white: give "
            f"--data.white-level {level} if that is their white"
        )
    if color and 2 * max(color) < WHITE:
        print0(
            f"warning: 16-bit color images in {source} have values up to {max(color)} (of "
            f"{len(color)} looked at), and only their high byte is read: convert them to 8 bits"
        )
