"""Augmented views as a DALI graph: the steps of `augment.view_of_image`, on a GPU or the CPU.

Nothing is drawn here. What was drawn comes in through `fn.external_source`, an array a parameter
(`dali_input.arrays_of`), and the graph carries it out with Pillow's rounding: to the nearest level
when resizing and blurring, cut off when blending, hue in 8-bit HSV. DALI's own operators would not
do: `random_resized_crop` lets pixels outside the window shine through its border, `color_twist`
turns hue in YIQ, and it and `contrast` take the middle of the range for the mean of the image.

An image is decoded once for all views. Jitter takes four rounds; in each an image undergoes the
operation that its order has there, so sixteen operations serve all 24 orders.

Importing this module needs DALI.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math

from rdm_fast.config import AugmentConfig, Interpolation
from rdm_fast.data.dali_input import Arrays
from rdm_fast.data.images import Pixels
from rdm_fast.data.sampler import BRIGHTNESS, CONTRAST, HUE, SATURATION
from rdm_kernels.view_colour import SOLARIZE_THRESHOLD

Node = Any
"""A batch of tensors that the graph will hold (DALI's DataNode)."""
Nodes = dict[str, Node]
Source = Callable[[Any], list[Any]]
"""From DALI's BatchInfo to images and the arrays of all views; it raises StopIteration."""

INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
DALI_TYPE = {
    np.dtype(np.bool_): types.BOOL,
    np.dtype(np.uint8): types.UINT8,
    np.dtype(np.int32): types.INT32,
    np.dtype(np.float32): types.FLOAT,
}
LEVELS = list(range(256))
SOLARIZED = [level if level < SOLARIZE_THRESHOLD else 255 - level for level in LEVELS]
CUT = -0.4995 / 255  # added before rounding to the nearest level, it makes that a floor


def pipeline_of_views(
    source: Source,
    augment: AugmentConfig,
    arrays: list[Arrays],
    *,
    batch: int,
    threads: int,
    device_id: int | None,
    encoded: bool,
    half: bool,
) -> Any:
    """A pipeline whose outputs are the views, [B, S, S, C], normalised.

    Args:
        source: what feeds it. It has no default arguments: DALI would fill the first.
        augment: sides, interpolation and normalisation.
        arrays: of each view, for any number of images: names, dtypes and dimensions are read.
        batch: B.
        threads: of the CPU.
        device_id: of the GPU; None for the CPU.
        encoded: images come as the bytes of a file, not as pixels [H, W, C].
        half: views are float16, not float32.
    """
    fed = [array for view in arrays for array in view.values()]
    firsts = np.cumsum([0, *map(len, arrays)])[:-1].tolist()
    laid_out = list(zip(firsts, arrays, augment.sizes, strict=True))
    on_gpu = device_id is not None

    def graph() -> tuple[Node, ...]:
        image, *nodes = fn.external_source(
            source=source,
            num_outputs=1 + len(fed),
            batch_info=True,
            dtype=[types.UINT8, *(DALI_TYPE[array.dtype] for array in fed)],
            ndim=[1 if encoded else 3, *(array.ndim - 1 for array in fed)],
            layout=["" if encoded else "HWC", *("" for _ in fed)],
        )
        if encoded:
            decoder = "mixed" if on_gpu else "cpu"
            image = fn.decoders.image(image, device=decoder, adjust_orientation=False)
        elif on_gpu:
            image = image.gpu()
        views = []
        for first, names, size in laid_out:
            p = {name: nodes[first + i] for i, name in enumerate(names)}
            x = view_of(image, p, size, augment.interpolation)
            views.append(normalised(x, p, augment, half))
        return tuple(views)

    build = pipeline_def(
        graph,
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=2,
        exec_dynamic=True,  # whose outputs are ours to keep
        enable_conditionals=True,
    )
    return build()


def decode_alone(file: Pixels, device_id: int | None) -> None:
    """Decode one encoded image, [n] bytes, on a GPU, or on the CPU if there is None.

    Raises:
        RuntimeError: DALI cannot.
    """

    def graph() -> Node:
        encoded = fn.external_source(source=lambda: [file], dtype=types.UINT8, ndim=1)
        decoder = "cpu" if device_id is None else "mixed"
        return fn.decoders.image(encoded, device=decoder, adjust_orientation=False)

    pipeline_def(graph, batch_size=1, num_threads=1, device_id=device_id)().run()


def view_of(image: Node, p: Nodes, S: int, interpolation: Interpolation) -> Node:
    """All steps up to the flip: uint8 [H, W, C] to [S, S, C]. `p` holds arrays_of as nodes."""
    x = fn.slice(image, p["corner"], p["sides"], axis_names="HW")  # so that no border is seen
    x = fn.resize(x, size=(S, S), interp_type=INTERPOLATION[interpolation], antialias=True)
    if p.get("distort"):
        x = distorted(x, p["matrix"])
    if "round0" in p:
        for i in range(4):
            x = jittered(x, p[f"round{i}"], p)
    if p.get("grey"):
        x = fn.color_space_conversion(luma(x), image_type=types.GRAY, output_type=types.RGB)
    if p.get("blur"):
        x = fn.gaussian_blur(x, window_size=p["window"], sigma=p["sigma"])
    if p.get("solarize"):
        x = fn.lookup_table(x, keys=LEVELS, values=SOLARIZED, dtype=types.UINT8)
    return x


def normalised(x: Node, p: Nodes, augment: AugmentConfig, half: bool) -> Node:
    """Flip and normalise, [S, S, C]."""
    return fn.crop_mirror_normalize(
        x,
        mirror=p["flip"],
        mean=[255 * m for m in augment.mean],
        std=[255 * s for s in augment.std],
        dtype=types.FLOAT16 if half else types.FLOAT,
        output_layout="HWC",
    )


def distorted(x: Node, matrix: Node) -> Node:
    """Rotated and sheared, black outside. (The operator's own fill blends into the border.)"""
    moved = fn.warp_affine(x, matrix=matrix, interp_type=types.INTERP_LINEAR, dtype=types.FLOAT)
    ones = fn.cast(x >= 0, dtype=types.UINT8)
    inside = fn.warp_affine(ones, matrix=matrix, interp_type=types.INTERP_NN, fill_value=0)
    return cut(moved) * inside


def jittered(x: Node, operation: Node, p: Nodes) -> Node:
    """One round of jitter."""
    colour = "turn" in p
    if operation == BRIGHTNESS:
        x = fn.brightness(x, brightness=p["brightness"], brightness_shift=CUT, dtype=types.UINT8)
    elif operation == CONTRAST:
        x = contrasted(x, p["contrast"], colour)
    if colour:
        if operation == SATURATION:
            x = cut(x * p["saturation"] + luma(x) * (1 - p["saturation"]))
        elif operation == HUE:
            x = hue_turned(x, p["turn"])
    return x


def contrasted(x: Node, factor: Node, colour: bool) -> Node:
    """mean + factor (x - mean), about the mean grey of each image."""
    grey = luma(x) if colour else x
    mean = dali_math.floor(fn.reductions.mean(grey, axes=[0, 1, 2]) + 0.5)
    return cut(x * factor + mean * (1 - factor))  # an operator's argument cannot be on the GPU


def cut(x: Node) -> Node:
    """Whole levels 0..255, cut off; 99.9999 makes 100. (math.floor is far slower on a CPU.)"""
    return fn.brightness(x, brightness=1.0, brightness_shift=CUT, dtype=types.UINT8)


def luma(x: Node) -> Node:
    """Grey levels of an RGB image, [S, S, 1]."""
    return fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)


def hue_turned(x: Node, turn: Node) -> Node:
    """Hue turned by `turn` / 255 of the circle in 8-bit HSV: `augment.turn_hue` in integers."""
    r, g, b = x[:, :, 0:1], x[:, :, 1:2], x[:, :, 2:3]
    value = dali_math.max(dali_math.max(r, g), b)
    chroma = value - dali_math.min(dali_math.min(r, g), b)
    is_r = r == value
    is_g = (g == value) & (r != value)
    is_b = (g != value) & (r != value)
    r, g, b = (fn.cast(plane, dtype=types.INT16) for plane in (r, g, b))
    c = fn.cast(chroma, dtype=types.INT16)
    sixths = is_r * (g - b) + is_g * (b - r + 2 * c) + is_b * (r - g + 4 * c)
    sixths = fn.cast(sixths + (sixths < 0) * (6 * c), dtype=types.INT32)  # of the circle, times c
    hue = fn.cast(255 * sixths // dali_math.max(6 * c, 1), dtype=types.UINT8) + turn  # goes round
    depth = 255 * fn.cast(chroma, dtype=types.INT32) // dali_math.max(value, 1) * value
    lack_r, lack_g, lack_b = (
        fn.lookup_table(hue, keys=LEVELS, values=lack, dtype=types.FLOAT) for lack in LACK
    )
    return fn.cat(
        whole(value - lack_r * depth),
        whole(value - lack_g * depth),
        whole(value - lack_b * depth),
        axis=2,
    )


def whole(x: Node) -> Node:
    """Rounded to whole levels 0..255."""
    return fn.brightness(x, brightness=1.0, dtype=types.UINT8)


def _lack() -> list[list[float]]:
    """How much of each primary a pure colour lacks, over 255, for each 8-bit hue."""
    hue = np.arange(256) * (6 / 255)
    pure = (np.abs(hue - 3) - 1, 2 - np.abs(hue - 2), 2 - np.abs(hue - 4))
    return [((1 - part.clip(0, 1)) / 255).tolist() for part in pure]


LACK = _lack()
