"""rdm_fast.data.views.augment: the batch against torchvision and Pillow, with the same parameters.

The two ways may differ by a rounding here and there, which later steps can enlarge: at most 1 %
of values may be off by more than 4 levels, and no image by more than 2 on average. The controls
show that this comparison notices a missing antialias, a missing hue and a wrong coin.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from rdm_fast.config import AugmentConfig, Interpolation, ViewConfig
from rdm_fast.data.views.augment import (
    blur_taps,
    levels_of_batch,
    normalize,
    view_of_image,
    views_of_batch,
)
from rdm_fast.data.views.sampler import ViewParameters, draw_views
from rdm_kernels.views.geometry import resampling_taps
from tests.data.conftest import natural

Pixels = NDArray[np.uint8]

STILL = ViewConfig(
    crop_scale=(1, 1), crop_ratio=(1, 1), brightness=0, contrast=0, saturation=0, hue=0
)  # crops the whole of a square image and leaves it alone
FULL = ViewConfig(crop_scale=(0.08, 1), jitter=0.8, grey=0.2, blur=0.5, solarize=0.2, flip=0.5)
RECIPES = {
    "simsiam": ViewConfig(crop_scale=(0.2, 1), jitter=0.8, grey=0.2, flip=0.5),
    "byol": FULL,
    "distorted": replace(FULL, rotate=20, shear=12),
}


def draw(images: Pixels, view: ViewConfig) -> ViewParameters:
    return draw_views(view, 5, 0, np.arange(len(images)), 0, *images.shape[1:3])


def one_by_one(images: Pixels, p: ViewParameters, augment: AugmentConfig) -> Pixels:
    return np.stack([view_of_image(image, p, row, augment) for row, image in enumerate(images)])


def as_batch(images: Pixels, p: ViewParameters, augment: AugmentConfig) -> Pixels:
    levels = levels_of_batch(torch.from_numpy(images), p, augment)
    return levels.permute(0, 2, 3, 1).numpy()


def distance(a: Pixels, b: Pixels) -> NDArray[np.float64]:
    return np.abs(a.astype(float) - b.astype(float)).reshape(len(a), -1)


def agree(a: Pixels, b: Pixels) -> bool:
    off = distance(a, b)
    return bool((off > 4).mean() <= 0.01 and off.mean(axis=1).max() <= 2.0)


@pytest.fixture(params=["photographs", "noise"])
def images(request: pytest.FixtureRequest) -> Pixels:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("view", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_batch_and_images_give_the_same_views(
    images: Pixels, view: ViewConfig, interpolation: Interpolation, size: int
) -> None:
    augment = AugmentConfig(size=size, interpolation=interpolation)
    p = draw(images, view)
    assert agree(as_batch(images, p, augment), one_by_one(images, p, augment))


@pytest.mark.parametrize("view", RECIPES.values(), ids=RECIPES)
def test_batch_and_images_agree_on_one_channel(images: Pixels, view: ViewConfig) -> None:
    augment = AugmentConfig(size=16, mean=(0.5,), std=(0.5,))
    p = draw(images, view)
    grey = np.ascontiguousarray(images[..., :1])
    assert agree(as_batch(grey, p, augment), one_by_one(grey, p, augment))


@pytest.mark.parametrize(
    ("change", "mean", "most"),
    [
        ({"crop_scale": (0.08, 1), "crop_ratio": (0.5, 2)}, 0.05, 1),
        ({"rotate": 30, "shear": 20}, 0.05, 1),
        ({"jitter": 1, "brightness": 0.4}, 0.5, 1),
        ({"jitter": 1, "contrast": 0.4}, 0.5, 1),
        ({"jitter": 1, "saturation": 0.4}, 0.5, 1),
        ({"jitter": 1, "hue": 0.1}, 0.5, 7),  # an 8-bit hue off by one turns color by 6 levels
        ({"jitter": 1, "hue": 0.5}, 0.5, 7),
        ({"grey": 1}, 0.05, 1),
        ({"blur": 1}, 0.05, 1),
        ({"solarize": 1}, 0, 0),
        ({"flip": 1}, 0, 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_step_alone_agrees(
    images: Pixels, change: dict[str, Any], mean: float, most: int
) -> None:
    square = np.ascontiguousarray(images[:, :32, :32])
    p, augment = draw(square, replace(STILL, **change)), AugmentConfig(size=32)
    expected = one_by_one(square, p, augment)
    off = distance(as_batch(square, p, augment), expected)
    assert off.mean(axis=1).max() <= mean and off.max() <= most
    assert distance(expected, square).mean() > 1  # the step did something


def test_a_mask_of_all_images_may_be_followed_by_one_of_some(photographs: Pixels) -> None:
    view, augment = replace(FULL, grey=1, blur=0.5, flip=1, solarize=0.5), AugmentConfig(size=24)
    p = draw(photographs, view)
    assert agree(as_batch(photographs, p, augment), one_by_one(photographs, p, augment))


def test_no_augmentation_returns_the_image(images: Pixels) -> None:
    square = np.ascontiguousarray(images[:, :32, :32])
    augment = AugmentConfig(size=32)
    np.testing.assert_array_equal(as_batch(square, draw(square, STILL), augment), square)


# ---- controls: the comparison must notice ----------------------------------------------------


def test_control_antialias_off_is_noticed(images: Pixels) -> None:
    augment, p = AugmentConfig(size=16), draw(images, STILL)
    window = [int(side[0]) for side in (p.top, p.left, p.height, p.width)]
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    aliased = vision.resized_crop(
        tensor, *window, [16, 16], interpolation=InterpolationMode.BILINEAR, antialias=False
    )
    same = as_batch(images, p, augment)
    assert agree(same, one_by_one(images, p, augment))
    assert not agree(same, aliased.permute(0, 2, 3, 1).numpy())


def test_control_hue_without_effect_is_noticed(images: Pixels) -> None:
    augment, p = AugmentConfig(size=32), draw(images, RECIPES["simsiam"])
    without = replace(p, hue=np.zeros(len(p)))
    assert not agree(as_batch(images, without, augment), one_by_one(images, p, augment))


def test_control_order_without_effect_is_noticed(images: Pixels) -> None:
    augment, p = AugmentConfig(size=32), draw(images, replace(FULL, jitter=1))
    fixed = replace(p, order=np.zeros(len(p), np.int64))
    assert not agree(as_batch(images, fixed, augment), one_by_one(images, p, augment))


def test_control_wrong_flip_coin_is_noticed(images: Pixels) -> None:
    augment = AugmentConfig(size=32)
    p, wrong = draw(images, FULL), draw(images, replace(FULL, flip=0.6))
    assert (p.flip != wrong.flip).any()
    assert not agree(as_batch(images, wrong, augment), one_by_one(images, p, augment))


# ---- properties ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 20, 32, 75])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resampling_is_pillows(size: int, interpolation: Interpolation, noise: Pixels) -> None:
    line = noise[0, 0, :, 0].astype(np.float32)  # mode F: Pillow without rounding
    left, width = 5, 31
    expected = Image.fromarray(line[None, left : left + width]).resize(
        (size, 1), Image.Resampling[interpolation.upper()]
    )
    start, length = torch.tensor([float(left)]), torch.tensor([float(width)])
    taps = resampling_taps(start, length, torch.zeros(1), len(line), size, interpolation)
    weights = taps.matrices(torch.tensor([0]))[0]
    torch.testing.assert_close(weights.sum(1), torch.ones(size))
    got = weights @ torch.from_numpy(line)
    # values up to 255 * 1.3 summed in float32, with weights each right to a few roundings
    torch.testing.assert_close(got, torch.from_numpy(np.array(expected))[0], atol=1e-3, rtol=0)


def test_pixels_outside_the_window_are_not_seen(photographs: Pixels) -> None:
    augment = AugmentConfig(size=32, interpolation="bicubic")
    p = draw(photographs, ViewConfig(crop_scale=(0.08, 0.5)))
    changed = np.full_like(photographs, 255)
    for i in range(len(p)):
        window = (
            i,
            slice(p.top[i], p.top[i] + p.height[i]),
            slice(p.left[i], p.left[i] + p.width[i]),
        )
        changed[window] = photographs[window]
    np.testing.assert_array_equal(as_batch(changed, p, augment), as_batch(photographs, p, augment))


def test_a_view_does_not_depend_on_its_neighbors(photographs: Pixels) -> None:
    augment, p = AugmentConfig(size=32), draw(photographs, RECIPES["distorted"])
    whole = as_batch(photographs, p, augment)
    rows = np.array([7, 50, 3])
    part = as_batch(photographs[rows], p.take(rows), augment)
    assert distance(part, whole[rows]).mean() < 0.01  # sums may be taken in another order


def test_views_are_normalized_last_in_float32_channels_last(photographs: Pixels) -> None:
    augment, p = AugmentConfig(size=24), draw(photographs, FULL)
    pixels = torch.from_numpy(photographs)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a trainer's autocast must not reach here
        views = views_of_batch(pixels, p, augment)
    levels = levels_of_batch(pixels, p, augment).double().numpy()
    expected = (levels / 255 - np.reshape(augment.mean, (3, 1, 1))) / np.reshape(
        augment.std, (3, 1, 1)
    )
    np.testing.assert_allclose(views.numpy(), expected, atol=2e-6)  # of order 4, in float32
    assert views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    from_bytes = normalize(torch.from_numpy(levels.astype(np.uint8)), augment)
    torch.testing.assert_close(from_bytes, views, rtol=0, atol=0)


def test_levels_stay_whole_and_in_range(noise: Pixels) -> None:
    levels = as_batch(noise, draw(noise, RECIPES["distorted"]), AugmentConfig(size=32))
    assert (levels == np.rint(levels)).all() and levels.min() >= 0 and levels.max() <= 255


@pytest.mark.parametrize(("size", "taps"), [(16, 3), (32, 3), (64, 7), (96, 9), (224, 23)])
def test_blur_kernel_is_the_odd_number_near_a_tenth(size: int, taps: int) -> None:
    assert blur_taps(size) == taps


@pytest.mark.parametrize("sigma", [0.1, 0.75, 1.3, 2.0])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [40, 224])
def test_an_image_is_blurred_as_by_torchvision(sigma: float, channels: int, size: int) -> None:
    """Both round a sum of float32: at most one level apart, where that sum is near a half."""
    square = np.ascontiguousarray(natural(1, size, size)[..., :channels])
    p = replace(draw(square, replace(STILL, blur=1)), sigma=np.array([sigma]))
    colors = {"mean": (0.5,) * channels, "std": (0.5,) * channels}
    got = one_by_one(square, p, AugmentConfig(size=size, **colors))
    planes = torch.from_numpy(square).permute(0, 3, 1, 2)
    expected = vision.gaussian_blur(planes, blur_taps(size), [sigma, sigma]).permute(0, 2, 3, 1)
    off = distance(got, expected.numpy())
    assert off.max() <= 1 and off.mean() < 1e-3
