"""The Triton kernels of `augment_views`: crop, resize, distort; then color, blur, normalize.

The arithmetic follows definition.py operation by operation, so that levels come out the same. A
program makes a tile of a view, all channels at once. One channel is treated as three equal ones, on
which saturation, hue and grey do nothing.
"""

import math

import triton
import triton.language as tl

from rdm_kernels.views.color import LUMA, LUMA_SHIFT, OPERATIONS, SOLARIZE_THRESHOLD
from rdm_kernels.views.definition import COLUMNS
from rdm_kernels.views.geometry import TIE

# ---- a row of the table ------------------------------------------------------------------------

(
    IMAGE, TOP, LEFT, HEIGHT, WIDTH, ORDER, GREY, SOLARIZE, FLIP, ANGLE, SHEAR, _, _, _, _, SIGMA,
) = map(tl.constexpr, range(len(COLUMNS)))  # fmt: skip
FACTORS = tl.constexpr(COLUMNS.index(OPERATIONS[0]))  # first column of the jitter's, in its order
BRIGHTNESS, CONTRAST, SATURATION, HUE = map(tl.constexpr, range(len(OPERATIONS)))
RED, GREEN, BLUE = map(tl.constexpr, LUMA)
LUMA_HALF = tl.constexpr(LUMA_SHIFT // 2)
LUMA_UNIT = tl.constexpr(1 / LUMA_SHIFT)  # a power of two, so a product is exact
THRESHOLD = tl.constexpr(SOLARIZE_THRESHOLD)
ROUNDING = tl.constexpr(TIE)
RADIANS = tl.constexpr(math.pi / 180)


@triton.jit
def _integer(table_ptr, column, n, view):
    return tl.load(table_ptr + n.to(tl.int64) * column + view)


@triton.jit
def _number(table_ptr, column, n, view):
    return _integer(table_ptr, column, n, view).to(tl.float32, bitcast=True)


@triton.jit
def _round(x):
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), 255.0)


@triton.jit
def _cut(x):
    return tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0))


# ---- geometry --------------------------------------------------------------------------------


@triton.jit
def _weight(pixel, center, stretch, length, CUBIC: tl.constexpr):
    """A pixel's weight in the output around `center`, before division by the sum of weights."""
    x = tl.abs(tl.div_rn(pixel + 0.5 - center, stretch))
    if CUBIC:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        weight = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        weight = tl.maximum(1.0 - x, 0.0)
    return tl.where((pixel >= 0.0) & (pixel < length), weight, 0.0)


@triton.jit
def _support(place, length, S, CUBIC: tl.constexpr):
    """Center, stretch, first pixel and number of pixels of outputs at `place` in a line of S."""
    radius: tl.constexpr = 2.0 if CUBIC else 1.0
    scale = tl.div_rn(length, S.to(tl.float32))
    stretch = tl.maximum(scale, 1.0)
    center = (place.to(tl.float32) + 0.5) * scale
    first = tl.floor(center - radius * stretch + 0.5)
    return center, stretch, first, tl.ceil(2.0 * radius * stretch).to(tl.int32)


@triton.jit
def _resized(at, plane, W, height, width, row, column, S, CUBIC: tl.constexpr):
    """Levels r, g, b of the resized window at (row, column), which broadcast; `at` is its corner.

    Across first and rounded, then down, like Pillow. Each row of the result recomputes its sums
    across: a few products more, and no scratch memory.
    """
    center_y, stretch_y, first_y, taps_y = _support(row, height, S, CUBIC)
    center_x, stretch_x, first_x, taps_x = _support(column, width, S, CUBIC)
    total_x = first_x * 0.0
    for tap in range(taps_x):
        total_x += _weight(first_x + tap, center_x, stretch_x, width, CUBIC)
    total_y = first_y * 0.0
    for tap in range(taps_y):
        total_y += _weight(first_y + tap, center_y, stretch_y, height, CUBIC)
    zero = total_y * total_x * 0.0
    r, g, b = zero, zero, zero
    for tap_y in range(taps_y):
        y = first_y + tap_y
        weight_y = tl.div_rn(_weight(y, center_y, stretch_y, height, CUBIC), total_y)
        across_r, across_g, across_b = zero, zero, zero
        for tap_x in range(taps_x):
            x = first_x + tap_x
            weight_x = tl.div_rn(_weight(x, center_x, stretch_x, width, CUBIC), total_x)
            inside = (y >= 0.0) & (y < height) & (x >= 0.0) & (x < width)
            pixel = at + y.to(tl.int32) * W + x.to(tl.int32)
            across_r += weight_x * tl.load(pixel, mask=inside, other=0).to(tl.float32)
            across_g += weight_x * tl.load(pixel + plane, mask=inside, other=0).to(tl.float32)
            across_b += weight_x * tl.load(pixel + 2 * plane, mask=inside, other=0).to(tl.float32)
        r += weight_y * _round(across_r + ROUNDING)
        g += weight_y * _round(across_g + ROUNDING)
        b += weight_y * _round(across_b + ROUNDING)
    return _round(r + ROUNDING), _round(g + ROUNDING), _round(b + ROUNDING)


@triton.jit
def _distorted(at, plane, W, height, width, row, column, angle, shear, S, CUBIC: tl.constexpr):
    """As `_resized`, rotated and sheared about the center: bilinear, black outside."""
    tangent = tl.sin(shear * RADIANS) / tl.cos(shear * RADIANS)
    cos, sin = tl.cos(angle * RADIANS), tl.sin(angle * RADIANS)
    half = (S - 1).to(tl.float32) * 0.5
    across, down = column.to(tl.float32) - half, row.to(tl.float32) - half
    x = (cos - sin * tangent) * across + (cos * tangent + sin) * down
    y = cos * down - sin * across
    edge = S.to(tl.float32) * 0.5
    inside = (x >= -edge) & (x < edge) & (y >= -edge) & (y < edge)
    x = tl.minimum(tl.maximum(x + half, 0.0), 2.0 * half)
    y = tl.minimum(tl.maximum(y + half, 0.0), 2.0 * half)
    left, top = tl.floor(x), tl.floor(y)
    zero = x * 0.0
    r, g, b = zero, zero, zero
    for corner in range(4):
        right, below = corner % 2, corner // 2
        weight_x = tl.where(right == 1, x - left, left + 1.0 - x)
        weight_y = tl.where(below == 1, y - top, top + 1.0 - y)
        near_x, near_y = tl.minimum(left + right, 2.0 * half), tl.minimum(top + below, 2.0 * half)
        part_r, part_g, part_b = _resized(
            at, plane, W, height, width, near_y, near_x, S, CUBIC
        )  # fmt: skip
        r += weight_y * weight_x * part_r
        g += weight_y * weight_x * part_g
        b += weight_y * weight_x * part_b
    r, g, b = _cut(r + 1e-3), _cut(g + 1e-3), _cut(b + 1e-3)
    return tl.where(inside, r, 0.0), tl.where(inside, g, 0.0), tl.where(inside, b, 0.0)


# ---- color ----------------------------------------------------------------------------------


@triton.jit
def _luma(r, g, b):
    return tl.floor((r * RED + g * GREEN + b * BLUE + LUMA_HALF) * LUMA_UNIT)


@triton.jit
def _blend(plain, x, factor):
    return _cut((x - plain) * factor + plain)


@triton.jit
def _primary(part, depth, value):
    """The level of red, green or blue, from its share of a pure color."""
    return _round((tl.minimum(tl.maximum(part, 0.0), 1.0) - 1.0) * depth + value)


@triton.jit
def _turned_hue(r, g, b, share):
    """In 8-bit HSV; quotients are rounded correctly, since a whole hue must not fall short."""
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    later = tl.where(g == value, b - r + 2.0 * chroma, r - g + 4.0 * chroma)
    sixths = tl.where(r == value, g - b, later)
    hue = tl.div_rn(tl.div_rn(sixths, tl.maximum(chroma, 1.0)), 6.0)
    hue = tl.floor((hue - tl.floor(hue)) * 255.0)
    saturation = tl.floor(tl.div_rn(chroma * 255.0, tl.maximum(value, 1.0)))
    turn = share * 255.0
    hue += tl.where(turn < 0.0, tl.ceil(turn), tl.floor(turn))
    hue = (hue - tl.floor(hue * (1 / 256)) * 256.0) * (6 / 255)
    depth = tl.div_rn(saturation * value, 255.0)
    r = _primary(tl.abs(hue - 3.0) - 1.0, depth, value)
    g = _primary(2.0 - tl.abs(hue - 2.0), depth, value)
    b = _primary(2.0 - tl.abs(hue - 4.0), depth, value)
    return r, g, b


@triton.jit
def _jittered(r, g, b, table_ptr, n, view, mean, rounds):
    """After the first rounds of the jitter; `mean` is the grey level that contrast keeps."""
    order = _integer(table_ptr, ORDER, n, view)
    for place in range(rounds):
        operation = (order >> (2 * place)) & 3
        factor = _number(table_ptr, operation + FACTORS, n, view)
        if operation == BRIGHTNESS:
            r, g, b = _cut(r * factor), _cut(g * factor), _cut(b * factor)
        elif operation == CONTRAST:
            r, g, b = _blend(mean, r, factor), _blend(mean, g, factor), _blend(mean, b, factor)
        elif operation == SATURATION:
            grey = _luma(r, g, b)
            r, g, b = _blend(grey, r, factor), _blend(grey, g, factor), _blend(grey, b, factor)
        elif factor != 0.0:  # 0 would still round, in 8-bit HSV
            r, g, b = _turned_hue(r, g, b, factor)
    return r, g, b


# ---- blur --------------------------------------------------------------------------------------


@triton.jit
def _reflected(place, S):
    """Where a place of a patch lies in the view, which its mirror images surround."""
    place = tl.abs(place)
    place = tl.where(place < S, place, 2 * (S - 1) - place)
    return tl.maximum(place, 0)  # farther out than the blur reaches


@triton.jit
def _gaussian(sigma, taps, BLOCK: tl.constexpr, PATCH: tl.constexpr):
    """The blur along one side as a matrix, [BLOCK, PATCH]; the patch starts taps // 2 before."""
    radius = taps // 2
    offset = tl.arange(0, PATCH)[None, :] - tl.arange(0, BLOCK)[:, None] - radius
    x = tl.div_rn(offset.to(tl.float32), sigma)
    weight = tl.where(tl.abs(offset) <= radius, tl.exp(-0.5 * x * x), 0.0)
    return tl.div_rn(weight, tl.sum(weight, axis=1)[:, None])


# ---- the passes --------------------------------------------------------------------------------


@triton.jit
def _tile(S, BLOCK: tl.constexpr):
    """This program's tile: rows [BLOCK, 1] and columns [1, BLOCK], some beyond the view."""
    across = tl.cdiv(S, BLOCK)
    tile = tl.program_id(1)
    row = (tile // across) * BLOCK + tl.arange(0, BLOCK)
    column = (tile % across) * BLOCK + tl.arange(0, BLOCK)
    return row[:, None], column[None, :]


@triton.jit(do_not_specialize=["n", "C", "H", "W", "S"])
def _resize_view_kernel(
    images_ptr, table_ptr, levels_ptr, sums_ptr, n, C, H, W, S,
    BLOCK: tl.constexpr, CUBIC: tl.constexpr,
):  # fmt: skip
    """Levels after crop, resize and distortion; of each tile, the sum that contrast needs."""
    view = tl.program_id(0).to(tl.int64)
    row, column = _tile(S, BLOCK)
    mask = (row < S) & (column < S)
    y, x = tl.minimum(row, S - 1), tl.minimum(column, S - 1)

    image = _integer(table_ptr, IMAGE, n, view).to(tl.int64)
    corner = _integer(table_ptr, TOP, n, view) * W + _integer(table_ptr, LEFT, n, view)
    at = images_ptr + image * C * H * W + corner
    plane = tl.where(C > 1, H * W, 0)
    height = _integer(table_ptr, HEIGHT, n, view).to(tl.float32)
    width = _integer(table_ptr, WIDTH, n, view).to(tl.float32)
    angle, shear = _number(table_ptr, ANGLE, n, view), _number(table_ptr, SHEAR, n, view)
    if (angle != 0.0) | (shear != 0.0):
        r, g, b = _distorted(at, plane, W, height, width, y, x, angle, shear, S, CUBIC)
    else:
        r, g, b = _resized(at, plane, W, height, width, y, x, S, CUBIC)

    out = levels_ptr + view * C * S * S + row * S + column
    plane = tl.where(C > 1, S * S, 0)
    tl.store(out, r.to(tl.uint8), mask=mask)
    tl.store(out + plane, g.to(tl.uint8), mask=mask)
    tl.store(out + 2 * plane, b.to(tl.uint8), mask=mask)

    order = _integer(table_ptr, ORDER, n, view)
    before = 0  # rounds of the jitter before contrast
    for place in tl.static_range(1, 4):
        before = tl.where(((order >> (2 * place)) & 3) == CONTRAST, place, before)
    r, g, b = _jittered(r, g, b, table_ptr, n, view, 0.0, before)
    total = tl.sum(tl.sum(tl.where(mask, _luma(r, g, b), 0.0), axis=1), axis=0)
    tl.store(sums_ptr + view * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit
def _store(out_ptr, x, table_ptr, n, view, row, column, channel, C, S, mean, std):
    """Solarize, flip and normalize a channel of a tile."""
    solarize = _integer(table_ptr, SOLARIZE, n, view) != 0
    flip = _integer(table_ptr, FLIP, n, view) != 0
    x = tl.where(solarize & (x >= THRESHOLD), 255.0 - x, x)
    place = tl.where(flip, S - 1 - column, column)
    out = out_ptr + ((view * S + row) * S + place) * C + channel  # channels_last
    if out.dtype.element_ty != tl.uint8:
        x = tl.div_rn(tl.div_rn(x, 255.0) - mean, std)
    tl.store(out, x.to(out.dtype.element_ty), mask=(row < S) & (column < S))


@triton.jit(do_not_specialize=["n", "C", "S"])
def _color_view_kernel(
    levels_ptr, sums_ptr, table_ptr, out_ptr, n, C, S,
    mean_r, mean_g, mean_b, std_r, std_g, std_b,
    BLOCK: tl.constexpr, MAX_TILES: tl.constexpr,
):  # fmt: skip
    """Jitter and grey; then the view, or levels again if a blur follows."""
    view = tl.program_id(0).to(tl.int64)
    row, column = _tile(S, BLOCK)
    mask = (row < S) & (column < S)
    tiles, tile = tl.num_programs(1), tl.arange(0, MAX_TILES)
    sums = tl.load(sums_ptr + view * tiles + tile, mask=tile < tiles, other=0.0)
    mean = tl.floor(tl.div_rn(tl.sum(sums, axis=0), (S * S).to(tl.float32)) + 0.5)

    plane = tl.where(C > 1, S * S, 0)
    at = levels_ptr + view * C * S * S + row * S + column
    r = tl.load(at, mask=mask, other=0).to(tl.float32)
    g = tl.load(at + plane, mask=mask, other=0).to(tl.float32)
    b = tl.load(at + 2 * plane, mask=mask, other=0).to(tl.float32)
    r, g, b = _jittered(r, g, b, table_ptr, n, view, mean, 4)
    if _integer(table_ptr, GREY, n, view) != 0:
        grey = _luma(r, g, b)
        r, g, b = grey, grey, grey

    if _number(table_ptr, SIGMA, n, view) != 0.0:
        tl.store(at, r.to(tl.uint8), mask=mask)
        tl.store(at + plane, g.to(tl.uint8), mask=mask)
        tl.store(at + 2 * plane, b.to(tl.uint8), mask=mask)
    else:
        _store(out_ptr, r, table_ptr, n, view, row, column, 0, C, S, mean_r, std_r)
        if C > 1:
            _store(out_ptr, g, table_ptr, n, view, row, column, 1, C, S, mean_g, std_g)
            _store(out_ptr, b, table_ptr, n, view, row, column, 2, C, S, mean_b, std_b)


@triton.jit(do_not_specialize=["n", "C", "S", "taps"])
def _blur_view_kernel(
    levels_ptr, table_ptr, out_ptr, n, C, S, taps,
    mean_r, mean_g, mean_b, std_r, std_g, std_b,
    BLOCK: tl.constexpr, PATCH: tl.constexpr,
):  # fmt: skip
    """Blur: a channel of a tile, from the patch that the blur reaches."""
    view, channel = tl.program_id(0).to(tl.int64), tl.program_id(2)
    sigma = _number(table_ptr, SIGMA, n, view)
    if sigma != 0.0:
        row, column = _tile(S, BLOCK)
        patch = tl.arange(0, PATCH) - taps // 2
        y = _reflected(tl.min(row) + patch, S)[:, None]
        x = _reflected(tl.min(column) + patch, S)[None, :]
        levels = tl.load(levels_ptr + (view * C + channel) * S * S + y * S + x).to(tl.float32)
        gaussian = _gaussian(sigma, taps, BLOCK, PATCH)
        across = tl.dot(levels, tl.trans(gaussian), input_precision="tf32x3")  # [PATCH, BLOCK]
        level = _round(tl.dot(gaussian, across, input_precision="tf32x3"))
        mean = tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
        std = tl.where(channel == 0, std_r, tl.where(channel == 1, std_g, std_b))
        _store(out_ptr, level, table_ptr, n, view, row, column, channel, C, S, mean, std)
