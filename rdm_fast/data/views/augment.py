"""Make the views that `sampler.draw_views` drew: crop, resize, distort, recolor, blur, normalize.

There are two ways to the same view. `view_of_image` takes one image through torchvision and Pillow,
and is the definition. `views_of_table` takes a batch of equal-sized images through the op
`augment_views`: tensor operations, Triton kernels on a GPU. Both hold pixels as whole levels 0..255
after every step and round as Pillow does; `rdm_kernels.views.definition` lists the steps.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from rdm_fast.config import AugmentConfig
from rdm_fast.data.views.sampler import (
    BRIGHTNESS,
    CONTRAST,
    JITTER_ORDERS,
    SATURATION,
    ViewParameters,
)
from rdm_kernels import augment_views, pack_views
from rdm_kernels.views.color import IDLE, SOLARIZE_THRESHOLD, normalize
from rdm_kernels.views.geometry import blur
from rdm_kernels.views.op import MAX_TAPS

Pixels = NDArray[np.uint8]

ORDER_CODES = (JITTER_ORDERS << 2 * np.arange(JITTER_ORDERS.shape[1])).sum(axis=1)
"""[24]: the jitter's orders as `augment_views` reads them, two bits for an operation."""


def blur_taps(augment: AugmentConfig, size: int) -> int:
    """Length of the blur's kernel: 5.5 of the largest sigma to either side, so 23 at 2 pixels, as
    in RDM's released code. Never more than a view reflects, or than the kernels take: 16 pixels,
    which is 4 of the largest sigma allowed."""
    sigma = max(view.blur_sigma[1] for view in augment.views)
    return 2 * min(math.ceil(5.5 * sigma), size - 1, MAX_TAPS // 2) + 1


# ---- one image, through torchvision and Pillow -----------------------------------------------


def view_of_image(
    image: Pixels,
    parameters: ViewParameters,
    row: int,
    augment: AugmentConfig,
    size: int | None = None,
) -> Pixels:
    """One view of one image.

    Args:
        image: [H, W, C], C 1 or 3.
        parameters: of some images; `row` is this image's place among them.
        augment: side and interpolation of the view.
        size: side, if it is not augment's.

    Returns:
        [size, size, C], not normalized.
    """
    p, grey, size = parameters, image.shape[2] == 1, size or augment.size
    view = vision.resized_crop(
        Image.fromarray(image[:, :, 0] if grey else image),
        *(int(side[row]) for side in (p.top, p.left, p.height, p.width)),
        [size, size],
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
        view = _blur_image(view, float(p.sigma[row]), blur_taps(augment, size))
    if p.solarize[row]:
        view = vision.solarize(view, SOLARIZE_THRESHOLD)
    if p.flip[row]:
        view = vision.horizontal_flip(view)
    return np.asarray(view).reshape(size, size, image.shape[2])


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
    return vision.adjust_hue(view, hue) if hue else view  # 0 would still round, in 8-bit HSV


def _blur_image(view: Image.Image, sigma: float, taps: int) -> Image.Image:
    """torchvision's `gaussian_blur`, one side after the other: its 2-D kernel of 23 x 23 taps takes
    ten times as long on a CPU, and thirty where sigma leaves it subnormal weights."""
    levels = torch.from_numpy(np.array(view, np.float32))  # [S, S] or [S, S, 3]
    planes = levels[None, None] if levels.ndim == 2 else levels.permute(2, 0, 1)[None]
    blurred = blur(planes, torch.full((1, 1, 1, 1), sigma), taps)
    pixels = blurred[0].to(torch.uint8)
    return Image.fromarray((pixels[0] if levels.ndim == 2 else pixels.permute(1, 2, 0)).numpy())


# ---- a batch, on any device ------------------------------------------------------------------


def view_table(parameters: Sequence[ViewParameters], images: NDArray[np.int64]) -> Tensor:
    """The drawn parameters as the table of `augment_views`: all images of each view in turn.

    Args:
        parameters: of each view, those of n images.
        images: places of these images in the op's batch, [n]; or [len(parameters), n] if each view
            has images of its own.

    Returns:
        [columns, len(parameters) * n], on the CPU.
    """
    p = {
        field.name: np.concatenate([getattr(drawn, field.name) for drawn in parameters])
        for field in dataclasses.fields(ViewParameters)
    }
    jitter = {name: np.where(p["jitter"], p[name], idle) for name, idle in IDLE.items()}
    return pack_views(
        p
        | jitter
        | {
            "image": np.broadcast_to(images, (len(parameters), images.shape[-1])).ravel(),
            "order": ORDER_CODES[p["order"]],
            "sigma": np.where(p["blur"], p["sigma"], 0),
        }
    )


def views_of_table(
    images: Tensor,
    table: Tensor,
    augment: AugmentConfig,
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
) -> Tensor:
    """Views of images on a device, ready for the backbone.

    Args:
        images: uint8 [N, C, H, W].
        table: of n views, from `view_table`, on the same device.
        augment: side, interpolation and normalization of the view.
        dtype: floating; or uint8, for levels that are not normalized.
        size: side, if it is not augment's.

    Returns:
        [n, C, size, size] in that dtype, channels_last.
    """
    size = size or augment.size
    return augment_views(
        images,
        table,
        size=size,
        interpolation=augment.interpolation,
        taps=blur_taps(augment, size),
        mean=augment.mean,
        std=augment.std,
        dtype=dtype,
    )


def views_of_batch(
    pixels: Tensor,
    parameters: ViewParameters,
    augment: AugmentConfig,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One view of each image of a batch.

    Args:
        pixels: uint8 [B, H, W, C], on any device, C 1 or 3.
        parameters: of B images, drawn for this H and W.
        augment, dtype: as in `views_of_table`.

    Returns:
        [B, C, size, size] in that dtype, channels_last.
    """
    table = view_table([parameters], np.arange(len(pixels))).to(pixels.device)
    return views_of_table(pixels.permute(0, 3, 1, 2), table, augment, dtype)


def views_of_levels(levels: Tensor, augment: AugmentConfig, device: torch.device) -> Tensor:
    """Views that a worker made, uint8 [B, S, S, C], normalized on the device.

    Returns:
        float32 [B, C, S, S], channels_last.
    """
    planes = levels.to(device, non_blocking=True).permute(0, 3, 1, 2)
    views = normalize(planes, augment.mean, augment.std)
    return views.contiguous(memory_format=torch.channels_last)
