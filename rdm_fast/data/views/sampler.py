"""Who sees which image, and how: a pure function of (seed, epoch, image index, view).

A counter-based generator draws order and augmentation here, on the host; loaders only carry them
out. So neither needs checkpoint state, both are the same at any world size and with any number of
workers, and two loaders can be compared pixel by pixel.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rdm_fast.config import ViewConfig
from rdm_fast.data.views.philox import HIGH, uniforms, words

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Coins = NDArray[np.bool_]

ORDER_STREAM = 0
VIEW_STREAM = 1  # and 2, for the second view, 3 for the first small one
CROP_TRIES = 10
SCALAR_BLOCKS = range(4)  # 16 numbers, of which 13 are used
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER_ORDERS: Integers = np.array(list(itertools.permutations(range(4))), np.int64)
"""[24, 4]: row `order` lists the jitter's four operations, first to last."""


@dataclass(frozen=True, slots=True)
class ViewParameters:
    """The drawn parameters of one view of n images: an array [n] a field.

    The window is in pixels of the image; the rest is in the order in which it is applied.
    """

    top: Integers
    left: Integers
    height: Integers
    width: Integers
    angle: Floats
    """Degrees, clockwise."""
    shear: Floats
    """Degrees, horizontal."""
    jitter: Coins
    brightness: Floats
    contrast: Floats
    saturation: Floats
    """Factors; 1 leaves the image as it is."""
    hue: Floats
    """Share of the color circle; 0 leaves the image as it is."""
    order: Integers
    """Row of JITTER_ORDERS."""
    grey: Coins
    blur: Coins
    sigma: Floats
    """Pixels of the view."""
    solarize: Coins
    flip: Coins

    def of_resized_windows(self, size: int) -> "ViewParameters":
        """The parameters that remain once the windows have been resized to `size` pixels a side."""
        nothing, whole = np.zeros_like(self.top), np.full_like(self.top, size)
        return dataclasses.replace(self, top=nothing, left=nothing, height=whole, width=whole)


def epoch_order(seed: int, epoch: int, n: int) -> Integers:
    """The permutation in which an epoch visits n images: [n] int64.

    Images are sorted by a random 64-bit key each (Philox of seed, epoch and index).
    """
    high, low, _, _ = words(seed, epoch, np.arange(n), ORDER_STREAM, range(1))
    return np.argsort((high << HIGH | low)[:, 0], kind="stable")


def step_indices(
    order: Integers, step: int, global_batch: int, rank: int, world_size: int
) -> Integers:
    """The images of one rank in one step of an epoch: [global_batch / world_size] int64.

    The step's global batch is a slice of the order, and the rank's part a contiguous slice of that.

    Raises:
        ValueError: the batch does not divide over the ranks.
        IndexError: the epoch has no such step; the last, partial batch is dropped.
    """
    local, rest = divmod(global_batch, world_size)
    if rest:
        raise ValueError(
            f"a global batch of {global_batch} does not divide over {world_size} ranks"
        )
    if not 0 <= step < len(order) // global_batch:
        raise IndexError(f"step {step} of an epoch of {len(order) // global_batch} steps")
    start = step * global_batch + rank * local
    return order[start : start + local]


def draw_views(
    view: ViewConfig,
    seed: int,
    epoch: int,
    indices: Integers,
    view_number: int,
    heights: ArrayLike,
    widths: ArrayLike,
) -> ViewParameters:
    """Draw one view of each image.

    Args:
        view: the ranges and probabilities.
        seed: of the run.
        epoch: counted from 0.
        indices: of the images in the data set, [n].
        view_number: from 0 on; the views of an image are independent.
        heights: of the images, in pixels, [n] or one for all.
        widths: likewise.
    """
    stream = VIEW_STREAM + view_number
    n = len(indices)
    heights, widths = np.broadcast_to(heights, n), np.broadcast_to(widths, n)
    u = uniforms(
        seed, epoch, indices, stream, SCALAR_BLOCKS
    ).T  # a row for each parameter, fixed for ever
    low, high = view.blur_sigma
    return ViewParameters(
        *_draw_windows(view, seed, epoch, indices, stream, heights, widths),
        angle=_around(0, view.rotate, u[0]),
        shear=_around(0, view.shear, u[1]),
        jitter=u[2] < view.jitter,
        brightness=_around(1, view.brightness, u[3]),
        contrast=_around(1, view.contrast, u[4]),
        saturation=_around(1, view.saturation, u[5]),
        hue=_around(0, view.hue, u[6]),
        order=(u[7] * len(JITTER_ORDERS)).astype(np.int64),
        grey=u[8] < view.grey,
        blur=u[9] < view.blur,
        sigma=low + (high - low) * u[10],
        solarize=u[11] < view.solarize,
        flip=u[12] < view.flip,
    )


def _around(center: float, reach: float, u: Floats) -> Floats:
    return center + reach * (2 * u - 1)


def _draw_windows(
    view: ViewConfig,
    seed: int,
    epoch: int,
    indices: Integers,
    stream: int,
    heights: Integers,
    widths: Integers,
) -> tuple[Integers, Integers, Integers, Integers]:
    """Crop windows (top, left, height, width) by the law of torchvision's RandomResizedCrop.

    Up to ten tries of an area uniform in crop_scale and a ratio log-uniform in crop_ratio, with
    rounded sides, taken at a uniform corner if they fit; else a centered window of the nearest
    allowed ratio.
    """
    top, left, height, width = _centered_windows(view.crop_ratio, heights, widths)
    (low, high), (narrow, wide) = view.crop_scale, map(math.log, view.crop_ratio)
    pending = np.arange(len(indices))
    for attempt in range(CROP_TRIES):
        block = range(len(SCALAR_BLOCKS) + attempt, len(SCALAR_BLOCKS) + attempt + 1)
        u = uniforms(seed, epoch, indices[pending], stream, block).T
        full_height, full_width = heights[pending], widths[pending]
        area = full_height * full_width * (low + (high - low) * u[0])
        ratio = np.exp(narrow + (wide - narrow) * u[1])
        h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        fits = (h > 0) & (h <= full_height) & (w > 0) & (w <= full_width)
        rows = pending[fits]
        height[rows], width[rows] = h[fits], w[fits]
        top[rows] = (u[2] * (full_height - h + 1))[fits].astype(np.int64)
        left[rows] = (u[3] * (full_width - w + 1))[fits].astype(np.int64)
        pending = pending[~fits]
        if not len(pending):
            break
    return top, left, height, width


def _centered_windows(
    ratios: tuple[float, float], heights: Integers, widths: Integers
) -> tuple[Integers, Integers, Integers, Integers]:
    narrow, wide = ratios
    ratio = widths / heights
    height = np.where(ratio < narrow, np.rint(widths / narrow).astype(np.int64), heights)
    width = np.where(ratio > wide, np.rint(heights * wide).astype(np.int64), widths)
    return (heights - height) // 2, (widths - width) // 2, height, width
