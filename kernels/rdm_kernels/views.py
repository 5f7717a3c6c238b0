"""What a random view of an image is: crop, resize, distort, recolour, blur, normalise.

This is the definition of the op `augment_views`, in PyTorch. A view is a row of numbers; nothing
is drawn here. Pixels are whole levels 0..255 after every step, rounded as Pillow does: it rounds
when it resizes, cuts off when it distorts or blends, and turns hue in 8-bit HSV.

Steps, in this order: crop and resize (antialiased), rotate and shear (black outside), jitter
(brightness, contrast, saturation and hue in any order), grey, Gaussian blur, solarize at 128,
flip, normalise. Images of one channel have no saturation, hue or grey.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

INTEGERS = ("image", "top", "left", "height", "width", "order", "grey", "solarize", "flip")
NUMBERS = ("angle", "shear", "brightness", "contrast", "saturation", "hue", "sigma")
COLUMNS = (*INTEGERS, *NUMBERS)

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
"""Of the jitter; `order` has the place here of each in two bits, the first in the lowest."""

SOLARIZE_THRESHOLD = 128
LUMA = (19595, 38470, 7471)  # ITU-R 601 in 1/65536, as Pillow has it; exact in float32
LUMA_SHIFT = 65536
NEGLIGIBLE = -30.0  # exponent of a weight: e^-90 would be subnormal, and slow on a CPU
TIE = 1e-4  # levels; more than float32 loses in a weighted mean of pixels

Rows = Mapping[str, Tensor]
"""Each of NUMBERS for some views, [n, 1, 1, 1]."""
Step = Callable[[Tensor, Rows], Tensor]
Mask = NDArray[np.bool_]


def pack_views(columns: Mapping[str, ArrayLike]) -> Tensor:
    """The parameters of n views as one table, so that they travel to a device in one copy.

    Args:
        columns: each of COLUMNS, [n].
            image: place of its image among all; top, left, height, width: window, in pixels.
            angle: rotation, in degrees, clockwise; shear: in degrees, horizontal; 0 for none.
            order: of the jitter, see OPERATIONS. brightness, contrast, saturation: factors, 1
            for none. hue: share of the colour circle, 0 for none.
            grey, solarize, flip: whether to. sigma: of the blur, in pixels of the view, 0 for none.

    Returns:
        [len(COLUMNS), n] int32 on the CPU, one column after another; those of NUMBERS hold the bits
        of float32.
    """
    integers = np.stack([np.asarray(columns[name], np.int32) for name in INTEGERS])
    numbers = np.stack([np.asarray(columns[name], np.float32) for name in NUMBERS])
    return torch.from_numpy(np.concatenate([integers, numbers.view(np.int32)]))


def levels_of_views(
    images: Tensor, table: Tensor, size: int, interpolation: str, taps: int
) -> Tensor:
    """Views before their normalisation: whole levels, float32 [n, C, size, size].

    Which views undergo a step is decided on the host: on a GPU this waits for the table.
    """
    colour = images.shape[1] == 3
    x = _crop_and_resize(images, table, size, interpolation)
    p = _unpack(table.cpu().numpy())
    steps: list[tuple[Mask, Step]] = [
        ((p["angle"] != 0) | (p["shear"] != 0), _distort),
        *_jitter_steps(p, colour),
        ((p["grey"] != 0) & colour, lambda x, _: luma(x).repeat(1, 3, 1, 1)),
        (p["sigma"] != 0, lambda x, rows: _blur(x, rows["sigma"], taps)),
        (p["solarize"] != 0, lambda x, _: torch.where(x < SOLARIZE_THRESHOLD, x, 255 - x)),
        (p["flip"] != 0, lambda x, _: x.flip(3)),
    ]
    numbers = table[len(INTEGERS) :].view(torch.float32)[:, :, None, None, None]
    for mask, step in steps:
        chosen = np.flatnonzero(mask)
        if len(chosen) == len(x):
            x = step(x, _named(numbers))
        elif len(chosen):
            rows = torch.from_numpy(chosen).to(x.device)
            x = x.index_copy_(0, rows, step(x[rows], _named(numbers[:, rows])))
    return x


def normalise(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(levels / 255 - mean) / std.

    Args:
        levels: [n, C, H, W], uint8 or float, 0..255.
        mean, std: of each channel, from 0 to 1.

    Returns:
        float32, the same shape.
    """
    means = torch.tensor(mean, device=levels.device)[:, None, None]
    stds = torch.tensor(std, device=levels.device)[:, None, None]
    x = levels.to(torch.float32, memory_format=torch.contiguous_format)  # faster channel by channel
    return x.div(255).sub_(means).div_(stds)


def _unpack(table: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """The columns of a table, [n] each, int32 or float32."""
    integers, numbers = np.split(table, [len(INTEGERS)])
    return dict(zip(COLUMNS, (*integers, *numbers.view(np.float32)), strict=True))


def _named(numbers: Tensor) -> Rows:
    return dict(zip(NUMBERS, numbers, strict=True))


def _jitter_steps(p: Mapping[str, NDArray[Any]], colour: bool) -> list[tuple[Mask, Step]]:
    """Four rounds; in each, every view undergoes the operation that its order has there."""
    steps: dict[str, tuple[float, Step]] = {  # with the value that does nothing
        "brightness": (1, lambda x, rows: _cut(x * rows["brightness"])),
        "contrast": (1, _contrast),
        "saturation": (1, lambda x, rows: blend(luma(x), x, rows["saturation"])),
        "hue": (0, lambda x, rows: turn_hue(x, rows["hue"])),
    }
    return [
        ((p["order"] >> 2 * place & 3 == number) & (p[name] != steps[name][0]), steps[name][1])
        for place in range(len(OPERATIONS))
        for number, name in enumerate(OPERATIONS if colour else OPERATIONS[:2])
    ]


# ---- geometry --------------------------------------------------------------------------------


def triangle(x: Tensor) -> Tensor:
    """Bilinear interpolation's filter; zero beyond 1."""
    return (1 - x.abs()).clamp_min(0)


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic filter with a = -0.5; zero beyond 2."""
    a, x = -0.5, x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


FILTERS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": triangle, "bicubic": cubic}


def resampling_weights(
    start: Tensor, length: Tensor, inputs: int, outputs: int, interpolation: str
) -> Tensor:
    """Matrices that resize a window of a line of pixels, as Pillow defines it.

    Output o is a mean of the pixels around (o + 0.5) * length / outputs, weighted by a filter
    that is stretched by that ratio when it shrinks the line, so that every pixel counts
    (antialiasing). Pixels outside the window are not seen.

    Args:
        start: first pixel of each window, [n] float32.
        length: pixels of each window, [n] float32.
        inputs: pixels of the line.
        outputs: pixels wanted.
        interpolation: one of FILTERS.

    Returns:
        [n, outputs, inputs] float32; rows sum to 1.
    """
    start, scale = start[:, None, None], (length / outputs)[:, None, None]
    end = start + length[:, None, None]
    place = torch.arange(outputs, device=start.device)[:, None] + 0.5
    pixel = torch.arange(inputs, device=start.device) + 0.5
    weights = FILTERS[interpolation]((pixel - start - place * scale) / scale.clamp_min(1))
    weights = weights * ((pixel > start) & (pixel < end))
    return weights / weights.sum(-1, keepdim=True)


def _crop_and_resize(images: Tensor, table: Tensor, size: int, interpolation: str) -> Tensor:
    image, top, left, height, width = table[:5]
    H, W = images.shape[2:]
    rows = resampling_weights(top.float(), height.float(), H, size, interpolation)  # [n, S, H]
    columns = resampling_weights(left.float(), width.float(), W, size, interpolation)  # [n, S, W]
    x = images[image].to(torch.float32, memory_format=torch.contiguous_format)
    x = _round_mean(x.flatten(1, 2) @ columns.mT)  # across first, as Pillow did until 13
    return _round_mean(rows[:, None] @ x.unflatten(1, images.shape[1:3]))


def _distort(x: Tensor, rows: Rows) -> Tensor:
    """Rotate and shear about the centre, [n, C, S, S]; the matrix is torchvision's, inverted."""
    S = x.shape[3]
    angle, tangent = rows["angle"].deg2rad()[:, 0], rows["shear"].deg2rad().tan()[:, 0]
    cos, sin = angle.cos(), angle.sin()
    centred = torch.arange(S, device=x.device) + (1 - S) / 2
    down, across = centred[:, None], centred[None, :]
    from_x = (cos - sin * tangent) * across + (cos * tangent + sin) * down  # [n, S, S]
    from_y = cos * down - sin * across
    grid = torch.stack((from_x, from_y), dim=-1) * (2 / S)
    moved = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    return _cut(moved + 1e-3) * inside  # the summand keeps 99.9999 from becoming 99


def blur_matrix(sigma: Tensor, size: int, taps: int) -> Tensor:
    """Gaussian blur of a line of pixels with reflected ends, as a matrix on it.

    Args:
        sigma: standard deviations in pixels, above 0, [..., 1, 1] float32.
        size: pixels of the line.
        taps: length of the kernel, odd, under 2 size.

    Returns:
        [..., size, size] float32; rows sum to 1.
    """
    offset = torch.arange(taps, device=sigma.device) - taps // 2
    exponent = -0.5 * (offset / sigma) ** 2  # [..., 1, taps]
    kernel = torch.softmax(exponent.masked_fill(exponent < NEGLIGIBLE, -math.inf), dim=-1)
    source = (torch.arange(size, device=sigma.device)[:, None] + offset).abs()
    source = torch.where(source < size, source, 2 * (size - 1) - source)  # [size, taps]
    shape = (*sigma.shape[:-2], size, taps)
    matrix = sigma.new_zeros(*sigma.shape[:-2], size, size)
    return matrix.scatter_add_(-1, source.expand(shape), kernel.expand(shape))


def _blur(x: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Gaussian blur with reflected borders, [n, C, S, S], as a matrix on either side."""
    matrix = blur_matrix(sigma, x.shape[3], taps)  # [n, 1, S, S]
    return (matrix @ x @ matrix.mT).round_()


# ---- colour ----------------------------------------------------------------------------------


def _round(x: Tensor) -> Tensor:
    return x.add_(0.5).floor_().clamp_(0, 255)


def _round_mean(x: Tensor) -> Tensor:
    """A tie goes up, in whatever order the pixels were added."""
    return _round(x.add_(TIE))


def _cut(x: Tensor) -> Tensor:
    return x.clamp_(0, 255).floor_()


def luma(x: Tensor) -> Tensor:
    """Grey levels of [n, 3, H, W] or [n, 1, H, W], as [n, 1, H, W]."""
    if x.shape[1] == 1:
        return x
    weighted = LUMA[0] * x[:, :1] + LUMA[1] * x[:, 1:2] + LUMA[2] * x[:, 2:]
    return weighted.add_(LUMA_SHIFT // 2).div_(LUMA_SHIFT).floor_()


def blend(plain: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """plain + factor (x - plain); plain is the mean grey, or the grey image."""
    return _cut((x - plain).mul_(factor).add_(plain))


def _contrast(x: Tensor, rows: Rows) -> Tensor:
    mean = luma(x).mean(dim=(1, 2, 3), keepdim=True)
    return blend(mean.add_(0.5).floor_(), x, rows["contrast"])


def turn_hue(x: Tensor, share: Tensor) -> Tensor:
    """Turn the hue of [n, 3, H, W] by a share of the circle, [n, 1, 1, 1], in 8-bit HSV."""
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    sixths = torch.where(
        r == value, g - b, torch.where(g == value, b - r + 2 * chroma, r - g + 4 * chroma)
    )
    hue = sixths.div_(chroma.clamp_min(1)).div_(6)
    hue = hue.sub_(hue.floor()).mul_(255).floor_()
    saturation = (chroma * 255).div_(value.clamp_min(1)).floor_()
    hue = (hue + (share[:, 0] * 255).trunc()).remainder_(256).mul_(6 / 255)
    depth = saturation.mul_(value).div_(255)
    # how much of each primary a pure colour holds: trapezoids round the circle of 6
    pure = ((hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_())
    return _round(
        torch.stack([(part.clamp_(0, 1) - 1).mul_(depth).add_(value) for part in pure], dim=1)
    )
