"""Random views of images that are on the device, in two passes, and a third that blurs.

    view = normalize(flip(solarize(blur(grey(jitter(distort(resize(crop(image)))))))))

definition.py defines the steps. A row of a table (`pack_views`) holds the parameters of a view. One
call makes any number of views of any images, for instance both views of a batch.

The PyTorch body `make_views` *defines* the op `rdm::augment_views`. Triton registers itself as its
CUDA kernel (kernels.py), which never makes the host wait. Levels equal the definition's except at
rounding ties: at most 0.1 % of them differ, by 1 in the step where it happens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from rdm_kernels.ops import cuda_launcher
from rdm_kernels.variant import Variant
from rdm_kernels.views.definition import COLUMNS, make_views
from rdm_kernels.views.geometry import FILTERS
from rdm_kernels.views.kernels import _blur_view_kernel, _color_view_kernel, _resize_view_kernel

DTYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
}


def augment_views(
    images: Tensor,
    table: Tensor,
    *,
    size: int,
    interpolation: str,
    taps: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Views of images, ready for the backbone.

    Args:
        images: uint8 [N, C, H, W], C 1 or 3.
        table: parameters of n views from `pack_views`, on the images' device. Its images and
            windows must exist: checking that would wait for the device.
        size: side of a view, in pixels; on CUDA at most MAX_SIZE.
        interpolation: "bilinear" or "bicubic", both antialiased.
        taps: length of the blur's kernel, odd, under 2 size; on CUDA at most MAX_TAPS.
        mean, std: of each channel, from 0 to 1.
        dtype: float32, bfloat16 or float16; uint8 gives levels that are not normalized.

    Returns:
        [n, C, size, size] in that dtype, channels_last.

    Raises:
        ValueError: a shape, dtype or option does not fit.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
        raise ValueError(
            "augment_views needs images uint8 [N, C, H, W] of 1 or 3 channels, "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    if table.ndim != 2 or len(table) != len(COLUMNS) or table.dtype != torch.int32:
        raise ValueError(
            f"augment_views needs a table int32 [{len(COLUMNS)}, n], as pack_views makes it, "
            f"got {table.dtype} {tuple(table.shape)}"
        )
    if table.device != images.device:
        raise ValueError(f"the images are on {images.device} and the table on {table.device}")
    if interpolation not in FILTERS or dtype not in DTYPES:
        raise ValueError(
            f"augment_views takes interpolation {' or '.join(FILTERS)} and dtype "
            f"{', '.join(map(str, DTYPES))}, got {interpolation!r} and {dtype}"
        )
    if taps % 2 != 1 or not 0 < taps < 2 * size:
        raise ValueError(f"taps={taps} is not an odd number under twice the size, {size}")
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"{len(mean)} means and {len(std)} deviations for {images.shape[1]} channels"
        )
    with torch.autocast(images.device.type, enabled=False):
        return augment_views_op(images, table, size, interpolation, taps, mean, std, dtype)


# ---- the op, defined by its body -------------------------------------------------------------

augment_views_op = torch.library.custom_op("rdm::augment_views", make_views, mutates_args=())


def _empty(images: Tensor, n: int, size: int, dtype: torch.dtype) -> Tensor:
    return images.new_empty(n, size, size, images.shape[1], dtype=dtype).permute(0, 3, 1, 2)


@augment_views_op.register_fake
def _(images: Tensor, table: Tensor, size: int, *options: Any) -> Tensor:
    return _empty(images, table.shape[1], size, options[-1])


# ---- block sizes and launchers -----------------------------------------------------------------

BLOCK = 32  # pixels a side of a tile
PATCH = 64  # and of what its blur is computed from
MAX_TAPS = PATCH - BLOCK + 1
MAX_TILES = 256  # of a view
MAX_SIZE = 16 * BLOCK
WARPS = 8


@cuda_launcher(augment_views_op)
def augment_views_triton(
    images: Tensor,
    table: Tensor,
    size: int,
    interpolation: str,
    taps: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    if size > MAX_SIZE or taps > MAX_TAPS:
        raise ValueError(
            f"on CUDA a view has at most {MAX_SIZE} pixels a side and its blur {MAX_TAPS} taps, "
            f"got size={size}, taps={taps}"
        )
    (_, C, H, W), n = images.shape, table.shape[1]
    images, table = images.contiguous(), table.contiguous()
    views = _empty(images, n, size, dtype)
    if n == 0:
        return views
    grid = (n, triton.cdiv(size, BLOCK) ** 2)
    levels = images.new_empty(n, C, size, size)
    sums = images.new_empty(grid, dtype=torch.float32)
    _resize_view_kernel[grid](
        images, table, levels, sums, n, C, H, W, size,
        BLOCK=BLOCK, CUBIC=interpolation == "bicubic", num_warps=WARPS,
    )  # fmt: skip
    of_channels = [values[c % C] for values in (mean, std) for c in range(3)]
    _color_view_kernel[grid](
        levels, sums, table, views, n, C, size, *of_channels,
        BLOCK=BLOCK, MAX_TILES=MAX_TILES, num_warps=WARPS,
    )  # fmt: skip
    _blur_view_kernel[(*grid, C)](
        levels, table, views, n, C, size, taps, *of_channels,
        BLOCK=BLOCK, PATCH=PATCH, num_warps=WARPS,
    )  # fmt: skip
    return views


def variants() -> list[Variant]:
    """Each pass, with either interpolation and every dtype of the views."""
    levels = {"table_ptr": "*i32", "levels_ptr": "*u8", "sums_ptr": "*fp32"}
    sizes = dict.fromkeys(("n", "C", "H", "W", "S", "taps"), "i32")
    resize = levels | {"images_ptr": "*u8"} | sizes
    launch = {"BLOCK": BLOCK, "num_warps": WARPS}
    found = [
        Variant(_resize_view_kernel, resize, launch | {"CUBIC": cubic}) for cubic in (False, True)
    ]
    numbers = dict.fromkeys([f"{what}_{c}" for what in ("mean", "std") for c in "rgb"], "fp32")
    for pointer in DTYPES.values():
        types = levels | {"out_ptr": pointer} | sizes | numbers
        found.append(Variant(_color_view_kernel, types, launch | {"MAX_TILES": MAX_TILES}))
        found.append(
            Variant(_blur_view_kernel, types, launch | {"PATCH": PATCH}, tensor_cores=True)
        )
    return found
