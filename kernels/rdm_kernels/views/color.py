"""Steps that change a pixel's color: jitter, grey, solarize, normalize; in PyTorch.

Every step takes whole levels 0..255, float32 [n, C, H, W] with C 1 or 3, and all but `normalize`
return such levels: blending truncates, hue is rounded in 8-bit HSV, as in Pillow. A step may
overwrite its input. On a CPU passes over memory take most of the time, so one pass less is worth a
less obvious line.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
"""Of the jitter. `order` has two bits for each operation, its place here; the first is lowest."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(len(OPERATIONS))

IDLE = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0}
"""Values with which an operation does nothing."""

SOLARIZE_THRESHOLD = 128
LUMA = (19595, 38470, 7471)  # ITU-R 601 in 1/65536, as Pillow has it; exact in float32
LUMA_SHIFT = 65536


def _cut(x: Tensor) -> Tensor:
    return x.clamp_(0, 255).floor_()


def luma(x: Tensor) -> Tensor:
    """Grey levels of [n, 3, H, W] or [n, 1, H, W], as [n, 1, H, W]."""
    if x.shape[1] == 1:
        return x
    red, green, blue = (weight / LUMA_SHIFT for weight in LUMA)  # exact, and so are the sums
    grey = (x[:, :1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:], alpha=blue)
    return grey.add_(0.5).floor_()


def to_grey(x: Tensor) -> Tensor:
    return luma(x).repeat(1, 3, 1, 1)


def solarize(x: Tensor) -> Tensor:
    """255 - x from 128 on, where that is the smaller."""
    return torch.minimum(x, 255 - x)


def blend(x: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """plain + factor (x - plain); plain is black, the mean grey or the grey image.

    Args:
        x: [n, C, H, W]. operation, factor: of each view, [n, 1, 1, 1].
    """
    grey = luma(x)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True).add_(0.5).floor_()
    plain = grey * (operation == SATURATION) + mean * (operation == CONTRAST)
    return _cut(x.sub_(plain).mul_(factor).add_(plain))


TRAPEZOIDS = ((3.0, 2.0, 4.0), (-2.0, 1.0, 1.0), (1.0, -1.0, -1.0))
"""Red, green and blue of a pure color, less 1, round a circle of 6: center, height and slope."""


def turn_hue(x: Tensor, share: Tensor) -> Tensor:
    """Turn the hue of [n, 3, H, W] by a share of the circle, [n, 1, 1, 1], in 8-bit HSV."""
    value = x.amax(1)
    red, green, blue = (value[:, None] - x).unbind(1)  # shortfall from the largest
    chroma = torch.maximum(torch.maximum(red, green), blue)
    sixths = blue - green  # where red is the largest
    where_green = (red - blue).add_(chroma, alpha=2)
    where_blue = (green - red).add_(chroma, alpha=4)
    # by torch.where this would take twenty times as long on a CPU
    sixths.lerp_(where_green.lerp_(where_blue, green.sign_()), red.sign_())
    hue = sixths.div_(chroma.clamp_min(1)).div_(6)
    hue = hue.sub_(hue.floor()).mul_(255).floor_()
    saturation = chroma.mul_(255).div_(value.clamp_min(1)).floor_()
    hue.add_((share[:, 0] * 255).trunc())
    hue = hue.sub_((hue / 256).floor_(), alpha=256).mul_(6 / 255)
    depth = saturation.mul_(value).div_(255)
    center, height, slope = x.new_tensor(TRAPEZOIDS)[..., None, None]
    below = (hue[:, None] - center).abs_().mul_(slope).add_(height).clamp_(-1, 0)
    return below.mul_(depth[:, None]).add_(value.add_(0.5)[:, None]).floor_()


def normalize(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
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
