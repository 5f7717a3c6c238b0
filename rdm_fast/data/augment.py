"""Carry out what `sampler.draw_views` drew: crop, resize, distort, recolour, blur, normalise.

Two ways to the same view. `view_of_image` takes one image through torchvision and Pillow: the
definition. `views_of_batch` takes a batch of equal-sized images through tensor operations on any
device. Both hold pixels as whole levels 0..255 after every step and round as Pillow does: it
rounds when it resizes, cuts off when it distorts or blends, and turns hue in 8-bit HSV.

Steps, in this order: crop and resize (antialiased), rotate and shear (black outside), jitter
(brightness, contrast, saturation and hue in the drawn order), grey, Gaussian blur, solarize at
128, flip; then `normalise`, which is the same for both ways. Images of one channel have no
saturation, hue or grey.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from rdm_fast.config import AugmentConfig, Interpolation
from rdm_fast.data.sampler import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    JITTER_ORDERS,
    SATURATION,
    ViewParameters,
)

Pixels = NDArray[np.uint8]

SOLARIZE_THRESHOLD = 128
LUMA = (19595, 38470, 7471)  # ITU-R 601 in 1/65536, as Pillow has it; exact in float32
LUMA_SHIFT = 65536


def blur_taps(size: int) -> int:
    """Length of the blur's kernel: the odd number nearest size / 10 (SimCLR's), at least 3."""
    return max(3, 2 * (size // 20) + 1)


# ---- one image, through torchvision and Pillow -----------------------------------------------


def view_of_image(
    image: Pixels, parameters: ViewParameters, row: int, augment: AugmentConfig
) -> Pixels:
    """One view of one image.

    Args:
        image: [H, W, C], C 1 or 3.
        parameters: of some images; `row` is this image's place among them.
        augment: side and interpolation of the view.

    Returns:
        [size, size, C], not normalised.
    """
    p, grey = parameters, image.shape[2] == 1
    view = vision.resized_crop(
        Image.fromarray(image[:, :, 0] if grey else image),
        *(int(side[row]) for side in (p.top, p.left, p.height, p.width)),
        [augment.size, augment.size],
        interpolation=InterpolationMode(augment.interpolation),
        antialias=True,
    )
    angle, shear = float(p.angle[row]), float(p.shear[row])
    if angle != 0 or shear != 0:
        view = vision.affine(
            view, angle, [0, 0], 1.0, [shear, 0.0], interpolation=InterpolationMode.BILINEAR
        )
    if p.jitter[row]:
        for operation in JITTER_ORDERS[p.order[row]]:
            view = _jitter_image(view, int(operation), p, row)
    if p.grey[row] and not grey:
        view = vision.rgb_to_grayscale(view, num_output_channels=3)
    if p.blur[row]:
        view = vision.gaussian_blur(view, blur_taps(augment.size), [float(p.sigma[row])] * 2)
    if p.solarize[row]:
        view = vision.solarize(view, SOLARIZE_THRESHOLD)
    if p.flip[row]:
        view = vision.horizontal_flip(view)
    return np.asarray(view).reshape(augment.size, augment.size, image.shape[2])


def _jitter_image(view: Image.Image, operation: int, p: ViewParameters, row: int) -> Image.Image:
    if operation == BRIGHTNESS:
        return vision.adjust_brightness(view, float(p.brightness[row]))
    if operation == CONTRAST:
        return vision.adjust_contrast(view, float(p.contrast[row]))
    if view.mode == "L":
        return view
    if operation == SATURATION:
        return vision.adjust_saturation(view, float(p.saturation[row]))
    hue = float(p.hue[row])
    return vision.adjust_hue(view, hue) if hue else view  # no way through 8-bit HSV for nothing


# ---- a batch, on any device ------------------------------------------------------------------


def views_of_batch(pixels: Tensor, parameters: ViewParameters, augment: AugmentConfig) -> Tensor:
    """One view of each image of a batch, ready for the backbone.

    Args:
        pixels: uint8 [B, H, W, C], on any device, C 1 or 3.
        parameters: of B images, drawn for this H and W.
        augment: side, interpolation and normalisation of the view.

    Returns:
        float32 [B, C, size, size], channels_last.
    """
    return normalise(levels_of_batch(pixels, parameters, augment), augment)


@torch.no_grad()
def levels_of_batch(pixels: Tensor, parameters: ViewParameters, augment: AugmentConfig) -> Tensor:
    """`views_of_batch` without its normalisation: whole levels 0..255, float32 [B, C, S, S]."""
    p = parameters
    colour = pixels.shape[3] == 3
    with torch.autocast(pixels.device.type, enabled=False):
        x = _crop_and_resize(pixels, p, augment)
        steps: list[tuple[NDArray[np.bool_], Step]] = []
        if colour:
            steps.append((p.grey, lambda x, _: luma(x).repeat(1, 3, 1, 1)))
        taps = blur_taps(augment.size)
        steps.append((p.blur, lambda x, rows: _blur(x, rows["sigma"], taps)))
        steps.append((p.solarize, lambda x, _: torch.where(x < SOLARIZE_THRESHOLD, x, 255 - x)))
        steps.append((p.flip, lambda x, _: x.flip(3)))
        steps = [((p.angle != 0) | (p.shear != 0), _distort), *_jitter_steps(p, colour), *steps]
        return _apply(steps, x, p)


def normalise(levels: Tensor, augment: AugmentConfig) -> Tensor:
    """(levels / 255 - mean) / std.

    Args:
        levels: [B, C, H, W], uint8 or float, 0..255.

    Returns:
        float32, the same shape, channels_last.
    """
    mean = torch.tensor(augment.mean, device=levels.device)[:, None, None]
    std = torch.tensor(augment.std, device=levels.device)[:, None, None]
    x = levels.to(torch.float32, memory_format=torch.contiguous_format)  # faster channel by channel
    return x.div(255).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


NUMBERS = ("angle", "shear", "brightness", "contrast", "saturation", "hue", "sigma")
Rows = dict[str, Tensor]
"""Each of NUMBERS for some images, [n, 1, 1, 1]."""
Step = Callable[[Tensor, Rows], Tensor]


def _apply(steps: list[tuple[NDArray[np.bool_], Step]], x: Tensor, p: ViewParameters) -> Tensor:
    """Carry out each step on the images whose mask is set. Which they are is known on the host,
    so nothing waits for the device; all index lists travel in one copy."""
    table = torch.from_numpy(np.stack([getattr(p, name) for name in NUMBERS]).astype(np.float32))
    table = table.to(x.device, non_blocking=True)[:, :, None, None, None]  # [numbers, B, 1, 1, 1]
    lists = [np.flatnonzero(mask) for mask, _ in steps]
    everything = torch.from_numpy(np.concatenate(lists)).to(x.device, non_blocking=True)
    chosen = everything.split([len(rows) for rows in lists])
    for rows, (_, step) in zip(chosen, steps, strict=True):
        if len(rows) == len(x):
            x = step(x, dict(zip(NUMBERS, table, strict=True)))
        elif len(rows):
            numbers = dict(zip(NUMBERS, table[:, rows], strict=True))
            x = x.index_copy_(0, rows, step(x[rows], numbers))
    return x


def _jitter_steps(p: ViewParameters, colour: bool) -> list[tuple[NDArray[np.bool_], Step]]:
    """Four rounds; in each, every image undergoes the operation that its order has there."""
    operations: list[tuple[int, NDArray[np.bool_], Step]] = [
        (BRIGHTNESS, p.brightness != 1, lambda x, rows: _cut(x * rows["brightness"])),
        (CONTRAST, p.contrast != 1, _contrast),
    ]
    if colour:
        operations += [
            (SATURATION, p.saturation != 1, lambda x, rows: blend(luma(x), x, rows["saturation"])),
            (HUE, p.hue != 0, lambda x, rows: turn_hue(x, rows["hue"])),
        ]
    return [
        (p.jitter & matters & (JITTER_ORDERS[p.order, place] == operation), step)
        for place in range(JITTER_ORDERS.shape[1])
        for operation, matters, step in operations
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


FILTERS: dict[Interpolation, Callable[[Tensor], Tensor]] = {"bilinear": triangle, "bicubic": cubic}


def resampling_weights(
    start: Tensor, length: Tensor, inputs: int, outputs: int, interpolation: Interpolation
) -> Tensor:
    """Matrices that resize a window of a line of pixels, as Pillow defines it.

    Output o is a mean of the pixels around (o + 0.5) * length / outputs, weighted by a filter
    that is stretched by that ratio when it shrinks the line, so that every pixel counts
    (antialiasing). Pixels outside the window are not seen.

    Args:
        start: first pixel of each window, [B] float32.
        length: pixels of each window, [B] float32.
        inputs: pixels of the line.
        outputs: pixels wanted.

    Returns:
        [B, outputs, inputs] float32; rows sum to 1.
    """
    start, scale = start[:, None, None], (length / outputs)[:, None, None]
    end = start + length[:, None, None]
    place = torch.arange(outputs, device=start.device)[:, None] + 0.5
    pixel = torch.arange(inputs, device=start.device) + 0.5
    weights = FILTERS[interpolation]((pixel - start - place * scale) / scale.clamp_min(1))
    weights = weights * ((pixel > start) & (pixel < end))
    return weights / weights.sum(-1, keepdim=True)


def _crop_and_resize(pixels: Tensor, p: ViewParameters, augment: AugmentConfig) -> Tensor:
    B, H, W, C = pixels.shape
    S = augment.size
    window = np.stack([p.top, p.height, p.left, p.width]).astype(np.float32)
    top, height, left, width = torch.from_numpy(window).to(pixels.device, non_blocking=True)
    rows = resampling_weights(top, height, H, S, augment.interpolation)  # [B, S, H]
    columns = resampling_weights(left, width, W, S, augment.interpolation)  # [B, S, W]
    x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x = _round(x.view(B, C * H, W) @ columns.mT)  # across first, like Pillow
    return _round(rows[:, None] @ x.view(B, C, H, S))


def _distort(x: Tensor, rows: Rows) -> Tensor:
    """Rotate and shear about the centre, [B, C, S, S]; the matrix is torchvision's, inverted."""
    S = x.shape[3]
    angle, tangent = rows["angle"].deg2rad()[:, 0], rows["shear"].deg2rad().tan()[:, 0]
    cos, sin = angle.cos(), angle.sin()
    centred = torch.arange(S, device=x.device) + (1 - S) / 2
    down, across = centred[:, None], centred[None, :]
    from_x = (cos - sin * tangent) * across + (cos * tangent + sin) * down  # [B, S, S]
    from_y = cos * down - sin * across
    grid = torch.stack((from_x, from_y), dim=-1) * (2 / S)
    moved = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    return _cut(moved + 1e-3) * inside  # the summand keeps 99.9999 from becoming 99


def _blur(x: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Gaussian blur with reflected borders, [B, C, S, S], as a matrix on either side."""
    S = x.shape[3]
    offset = torch.arange(taps, device=x.device) - taps // 2
    kernel = torch.softmax(-0.5 * (offset / sigma[:, 0]) ** 2, dim=-1)  # [B, 1, taps]
    source = (torch.arange(S, device=x.device)[:, None] + offset).abs()
    source = torch.where(source < S, source, 2 * (S - 1) - source)  # [S, taps]
    shape = (len(x), S, taps)
    matrix = x.new_zeros(len(x), S, S).scatter_add_(2, source.expand(shape), kernel.expand(shape))
    return (matrix[:, None] @ x @ matrix.mT[:, None]).round_()


# ---- colour ----------------------------------------------------------------------------------


def _round(x: Tensor) -> Tensor:
    return x.add_(0.5).floor_().clamp_(0, 255)


def _cut(x: Tensor) -> Tensor:
    return x.clamp_(0, 255).floor_()


def luma(x: Tensor) -> Tensor:
    """Grey levels of [B, 3, H, W] or [B, 1, H, W], as [B, 1, H, W]."""
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
    """Turn the hue of [B, 3, H, W] by a share of the circle, [B, 1, 1, 1], in 8-bit HSV."""
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
