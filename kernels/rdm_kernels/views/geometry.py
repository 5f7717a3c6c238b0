"""Steps that move pixels: crop, resize and flip, distort, blur; in PyTorch.

A step takes whole levels 0..255 and returns whole levels, rounded as Pillow does. A matrix resizes
or blurs a line of pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEGLIGIBLE = -30.0  # exponent of a weight; e^-90 would be subnormal, and slow on a CPU
BLOCK = 32  # pixels that are blurred at a time
TIE = 1e-4  # levels; more than float32 loses in a weighted mean of pixels

# ---- crop, resize, flip ------------------------------------------------------------------------


def triangle(x: Tensor) -> Tensor:
    """Bilinear interpolation's filter; zero beyond 1."""
    return (1 - x.abs()).clamp_min(0)


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic filter with a = -0.5; zero beyond 2."""
    a, x = -0.5, x.abs()
    inner, outer = x.clamp_max(1), x.clamp(1, 2)  # either part is zero where it ends
    near = ((a + 2) * inner - (a + 3)) * inner * inner + 1
    far = (((outer - 5) * outer + 8) * outer - 4) * a
    return near + far


FILTERS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": triangle, "bicubic": cubic}
REACH = {"bilinear": 1, "bicubic": 2}
"""Where a filter becomes zero."""


@dataclass(frozen=True, slots=True)
class Taps:
    """The pixels, and their weights, whose means are the outputs of n lines."""

    pixel: Tensor
    """int64 [n, outputs, near]"""
    weight: Tensor
    """float32 [n, outputs, near]; sums to 1 over an output's pixels."""
    inputs: int
    """Pixels of a line."""

    def matrices(self, lines: Tensor) -> Tensor:
        """The matrices of some lines, [len(lines), outputs, inputs]."""
        weight = self.weight[lines]
        empty = weight.new_zeros(*weight.shape[:2], self.inputs)
        return empty.scatter_(2, self.pixel[lines], weight)


def resampling_taps(
    start: Tensor, length: Tensor, flipped: Tensor, inputs: int, outputs: int, interpolation: str
) -> Taps:
    """How to resize a window of a line of pixels, as Pillow defines it.

    Output o is a mean of the pixels around (o + 0.5) * length / outputs, weighted by a filter
    that is stretched by that ratio when it shrinks the line, so that every pixel counts
    (antialiasing). Pixels outside the window are not seen.

    Args:
        start: first pixel of each window, [n].
        length: pixels of each window, [n].
        flipped: not zero for those whose outputs come in the opposite order, [n].
        inputs: pixels of the line.
        outputs: pixels wanted.
        interpolation: one of FILTERS.
    """
    start, length, flipped = (of[:, None, None] for of in (start, length, flipped))
    scale = length.float() / outputs
    end, stretch = start + length, scale.clamp_min(1)
    output = torch.arange(outputs, device=start.device)[:, None]
    output = torch.where(flipped != 0, outputs - 1 - output, output)
    place = start + (output + 0.5) * scale
    reach = REACH[interpolation] * stretch
    near = min(inputs, math.ceil(2 * float(reach.max())) + 1)  # pixels that an output can see
    first = (place - reach).floor().clamp(0, inputs - near)
    pixel = first + torch.arange(near, device=start.device)  # [n, outputs, near]
    weight = FILTERS[interpolation]((pixel + 0.5 - place) / stretch)
    weight = weight * ((pixel >= start) & (pixel < end))
    return Taps(pixel.long(), weight / weight.sum(-1, keepdim=True), inputs)


def resize(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Levels [n, C, H, W], uint8, to [n, C, S, S], float32, by matrices [n, S, H] and [n, S, W]."""
    (n, C, H, _), S = x.shape, down.shape[1]
    x = as_levels(x)
    x = _round_mean(x.flatten(1, 2) @ across.mT).unflatten(1, (C, H))  # as Pillow did until 13
    resized = x.new_empty(n, C, S, S)
    for channel in range(C):
        torch.bmm(down, x[:, channel], out=resized[:, channel])
    return _round_mean(resized)


def as_levels(x: Tensor) -> Tensor:
    """uint8 to float32, a plane a channel, as all steps take it."""
    return x.to(torch.float32, memory_format=torch.contiguous_format)


def mirror(x: Tensor) -> Tensor:
    return x.flip(-1)


def _round_mean(x: Tensor) -> Tensor:
    """Round; ties go up, in whatever order the pixels were added."""
    return x.add_(0.5 + TIE).floor_().clamp_(0, 255)


# ---- distort -----------------------------------------------------------------------------------


def distort(x: Tensor, angle: Tensor, shear: Tensor) -> Tensor:
    """Rotate and shear about the center; black outside. The matrix is torchvision's, inverted.

    Args:
        x: [n, C, S, S].
        angle, shear: in degrees, clockwise and horizontal, [n, 1, 1, 1].
    """
    S = x.shape[3]
    angle, tangent = angle.deg2rad()[:, 0], shear.deg2rad().tan()[:, 0]
    cos, sin = angle.cos(), angle.sin()
    centered = torch.arange(S, device=x.device) + (1 - S) / 2
    down, across = centered[:, None], centered[None, :]
    from_x = (cos - sin * tangent) * across + (cos * tangent + sin) * down  # [n, S, S]
    from_y = cos * down - sin * across
    grid = torch.stack((from_x, from_y), dim=-1) * (2 / S)
    moved = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    return moved.add_(1e-3).floor_() * inside  # the summand keeps 99.9999 from becoming 99


# ---- blur --------------------------------------------------------------------------------------


def gaussian(sigma: Tensor, taps: int) -> Tensor:
    """Weights of a blur along a line.

    Args:
        sigma: standard deviations in pixels, above 0, [..., 1] float32.
        taps: length of the kernel, odd.

    Returns:
        [..., taps] float32; they sum to 1.
    """
    offset = torch.arange(taps, device=sigma.device) - taps // 2
    exponent = -0.5 * (offset / sigma) ** 2
    return torch.softmax(exponent.masked_fill(exponent < NEGLIGIBLE, -math.inf), dim=-1)


def banded(kernel: Tensor, rows: int) -> Tensor:
    """Correlation with kernels [..., taps] as matrices [..., rows, rows + taps - 1]."""
    taps = kernel.shape[-1]
    row, tap = (torch.arange(n, device=kernel.device) for n in (rows, taps))
    place = row[:, None] + tap
    weights = kernel[..., None, :].expand(*kernel.shape[:-1], rows, taps)
    matrix = kernel.new_zeros(*kernel.shape[:-1], rows, rows + taps - 1)
    return matrix.scatter_(-1, place.expand_as(weights), weights)


def blur(x: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Gaussian blur with reflected borders, [n, C, S, S], `sigma` [n, 1, 1, 1].

    Along either side, BLOCK pixels at a time are a banded matrix on those that they depend on.
    """
    S, radius = x.shape[3], taps // 2
    blocks = math.ceil(S / BLOCK)
    matrix = banded(gaussian(sigma[..., 0], taps), BLOCK)  # [n, 1, BLOCK, near]
    near, excess = BLOCK + 2 * radius, blocks * BLOCK - S
    x = F.pad(F.pad(x, (radius,) * 4, mode="reflect"), (0, excess, 0, excess))
    lines = x.unfold(3, near, BLOCK).flatten(2, 3)  # [n, C, (S + ...) * blocks, near]
    x = (lines @ matrix.mT).unflatten(2, (-1, blocks)).flatten(3)  # [n, C, S + ..., S + excess]
    lines = x.unfold(2, near, BLOCK)  # [n, C, blocks, S + excess, near]
    return (matrix[:, :, None] @ lines.mT).flatten(2, 3)[..., :S, :S].round_()
