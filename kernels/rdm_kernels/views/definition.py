"""The definition of the op `augment_views` in PyTorch: crop, resize, distort, recolor, blur.

A view is a row of numbers; nothing is drawn here. Pixels are whole levels 0..255 after every step,
as in Pillow: resizing rounds, distorting and blending truncate, and hue is turned in 8-bit HSV.

Steps, in this order: crop and resize (antialiased), rotate and shear (black outside), jitter
(brightness, contrast, saturation and hue in any order), grey, Gaussian blur, solarize at 128,
flip, normalize. Images of one channel have no saturation, hue or grey. geometry.py and color.py
have the steps; this file applies each to the views that undergo it. The flip comes with the resize,
where taking pixels in another order costs nothing: every later step commutes with it. Where all
windows are whole images of a view's size, nothing is resized.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rdm_kernels.views.color import (
    HUE,
    IDLE,
    OPERATIONS,
    blend,
    normalize,
    solarize,
    to_grey,
    turn_hue,
)
from rdm_kernels.views.geometry import (
    as_levels,
    blur,
    distort,
    mirror,
    resampling_taps,
    resize,
)

INTEGERS = ("image", "top", "left", "height", "width", "order", "grey", "solarize", "flip")
NUMBERS = ("angle", "shear", "brightness", "contrast", "saturation", "hue", "sigma")
COLUMNS = (*INTEGERS, *NUMBERS)

PIXELS = 1 << 17  # of the views made at a time, so that they stay in a CPU's cache

Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]
Columns = dict[str, NDArray[Any]]
"""Each of COLUMNS for n views, [n], on the host."""


def pack_views(columns: Mapping[str, ArrayLike]) -> Tensor:
    """The parameters of n views as one table, so that they travel to a device in one copy.

    Args:
        columns: each of COLUMNS, [n].
            image: place of its image among all; top, left, height, width: window, in pixels.
            angle: rotation, in degrees, clockwise; shear: in degrees, horizontal; 0 for none.
            order: of the jitter, see OPERATIONS. brightness, contrast, saturation: factors, 1
            for none. hue: share of the color circle, 0 for none.
            grey, solarize, flip: 1 for yes. sigma: of the blur, in pixels of the view, 0 for none.

    Returns:
        [len(COLUMNS), n] int32 on the CPU, one column after another; those of NUMBERS hold the bits
        of float32.
    """
    integers = np.stack([np.asarray(columns[name], np.int32) for name in INTEGERS])
    numbers = np.stack([np.asarray(columns[name], np.float32) for name in NUMBERS])
    return torch.from_numpy(np.concatenate([integers, numbers.view(np.int32)]))


def make_views(
    images: Tensor,
    table: Tensor,
    size: int,
    interpolation: str,
    taps: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """The body of the op; arguments and result as in `augment_views`.

    The host decides which views undergo a step, so on a GPU it waits for the table.
    """
    device = images.device
    views = images.new_empty(table.shape[1], size, size, images.shape[1], dtype=dtype)
    p = _columns(table.cpu().numpy())
    resized = _resizing(p, images.shape[2:], size, interpolation, device)
    for part in _parts(p, size):
        few, rows = {name: column[part] for name, column in p.items()}, _tensor(part, device)
        x = resized(images[_tensor(few["image"], device)], few, rows)
        x = _recolor(_distort(x, few), few, taps)
        made = x if dtype == torch.uint8 else normalize(x, mean, std)
        made = made.to(dtype, memory_format=torch.channels_last)
        views.index_copy_(0, rows, made.permute(0, 2, 3, 1))
    return views.permute(0, 3, 1, 2)


def _resizing(
    p: Columns, sides: torch.Size, size: int, interpolation: str, device: torch.device
) -> Callable[[Tensor, Columns, Tensor], Tensor]:
    """A function that crops, resizes and flips the images of some views."""
    whole = all((p[name] == size).all() for name in ("height", "width"))
    if not len(p["image"]) or (whole and sides == (size, size)):
        return lambda x, few, rows: _some(as_levels(x), few["flip"] != 0, mirror)
    top, left, height, width, flip = (
        _tensor(p[name], device) for name in ("top", "left", "height", "width", "flip")
    )
    down = resampling_taps(top, height, torch.zeros_like(flip), sides[0], size, interpolation)
    across = resampling_taps(left, width, flip, sides[1], size, interpolation)
    return lambda x, few, rows: resize(x, down.matrices(rows), across.matrices(rows))


def _columns(table: NDArray[np.int32]) -> Columns:
    integers, numbers = np.split(table, [len(INTEGERS)])
    return dict(zip(COLUMNS, (*integers, *numbers.view(np.float32)), strict=True))


def _tensor(column: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(column).to(device)


def _parts(p: Columns, size: int) -> Iterator[Rows]:
    """All views, a few at a time, so that intermediate results stay in a CPU's cache.

    The views of a part turn hue in the same round of the jitter, or are not jittered at all: the
    more views undergo a step together, the better.
    """
    turn = np.argmax([_operation(p, place) == HUE for place in range(len(OPERATIONS))], axis=0)
    jittered = np.any([p[name] != idle for name, idle in IDLE.items()], axis=0)
    kind = np.where(jittered, turn, len(OPERATIONS))
    for one in np.unique(kind):
        alike = np.flatnonzero(kind == one)
        yield from np.array_split(alike, math.ceil(len(alike) * size**2 / PIXELS))


def _operation(p: Columns, place: int) -> NDArray[np.int32]:
    """The jitter's operation in that place, [n]: an index of OPERATIONS."""
    operation: NDArray[np.int32] = p["order"] >> 2 * place & 3
    return operation


# ---- the steps, in order -----------------------------------------------------------------------


def _distort(x: Tensor, p: Columns) -> Tensor:
    """Distort; views that are flipped already turn and lean the other way."""
    sign = np.where(p["flip"] != 0, -1, 1).astype(np.float32)
    angle, shear = sign * p["angle"], sign * p["shear"]
    return _some(x, (angle != 0) | (shear != 0), distort, angle, shear)


def _recolor(x: Tensor, p: Columns, taps: int) -> Tensor:
    color = x.shape[1] == 3
    for place in range(len(OPERATIONS)):
        operation = _operation(p, place)
        factor = np.choose(operation, [p[name] for name in OPERATIONS])
        turned = (operation == HUE) & (factor != 0)  # by 0 would still round, in 8-bit HSV
        x = _some(x, turned & color, turn_hue, factor)
        x = _some(x, (operation != HUE) & (factor != 1), blend, operation, factor)
    x = _some(x, (p["grey"] != 0) & color, to_grey)
    x = _some(x, p["sigma"] != 0, partial(blur, taps=taps), p["sigma"])
    return _some(x, p["solarize"] != 0, solarize)


def _some(x: Tensor, mask: Mask, step: Callable[..., Tensor], *columns: NDArray[Any]) -> Tensor:
    """Apply a step to the views in `mask`; `x` may be overwritten.

    `step` gets these views, and their rows of the columns as tensors [n, 1, 1, 1].
    """
    rows = np.flatnonzero(mask)
    if not len(rows):
        return x
    parameters = [_tensor(column[rows], x.device)[:, None, None, None] for column in columns]
    if len(rows) == len(x):
        return step(x, *parameters)
    there = _tensor(rows, x.device)
    return x.index_copy_(0, there, step(x[there], *parameters))
