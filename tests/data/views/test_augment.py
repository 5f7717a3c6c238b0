"""Views made in three ways against Pillow and torchvision, with the same parameters.

    definition   the PyTorch body of `augment_views`, a batch at a time
    kernels      its Triton kernels; few images, since without a GPU Triton's interpreter runs them
    dali         DALI crops and resizes, then the op

A rounding here and there may differ, and later steps enlarge it: at most 1 % of values may be off
by more than 4 levels, and no image by more than 2 on average; single steps are closer. The controls
show that the comparison notices a wrong pipeline.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from torchvision.transforms.v2 import functional as vision

from rdm_fast.config import AugmentConfig, Interpolation, ViewConfig
from rdm_fast.data.loaders.dali_input import window
from rdm_fast.data.loaders.dali_loader import finished
from rdm_fast.data.views.augment import (
    blur_taps,
    view_of_image,
    view_table,
    views_of_batch,
    views_of_levels,
)
from rdm_fast.data.views.sampler import JITTER_ORDERS, ViewParameters, draw_views
from rdm_kernels.views.geometry import resampling_taps
from rdm_kernels.views.op import augment_views_triton
from tests.data.files import natural
from tests.data.loaders.dali_here import HERE, needs_dali

if HERE:
    from nvidia.dali import fn

    from rdm_fast.data.loaders import dali_graph

Pixels = NDArray[np.uint8]
Way = Callable[[Pixels, ViewParameters, AugmentConfig], Pixels]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

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


def by_pillow(images: Pixels, p: ViewParameters, augment: AugmentConfig) -> Pixels:
    return np.stack([view_of_image(image, p, row, augment) for row, image in enumerate(images)])


def by_definition(images: Pixels, p: ViewParameters, augment: AugmentConfig) -> Pixels:
    levels = views_of_batch(torch.from_numpy(images), p, augment, torch.uint8)
    return levels.permute(0, 2, 3, 1).numpy()


def by_kernels(images: Pixels, p: ViewParameters, augment: AugmentConfig) -> Pixels:
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).to(DEVICE)
    table = view_table([p], np.arange(len(images))).to(DEVICE)
    levels = augment_views_triton(
        planes, table, augment.size, augment.interpolation,
        blur_taps(augment, augment.size),
        augment.mean, augment.std, torch.uint8,
    )  # fmt: skip
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def by_dali(images: Pixels, p: ViewParameters, augment: AugmentConfig) -> Pixels:
    pipeline = dali_graph.pipeline_of_crops(
        lambda: [list(images), *window(p)],
        [augment.size],
        augment.interpolation,
        batch=len(images),
        threads=1,
        device_id=None,
        encoded=False,
    )
    crops = torch.from_numpy(np.array(pipeline.run()[0].as_array()))
    return finished([crops], [p], augment, augment.size, torch.uint8)[0].permute(0, 2, 3, 1).numpy()


EVERY_WAY = pytest.mark.parametrize(
    ("way", "n"),
    [
        pytest.param(by_definition, 24, id="definition"),
        pytest.param(by_kernels, 2, id="kernels"),
        pytest.param(by_dali, 24, marks=needs_dali, id="dali"),
    ],
)


def distance(a: Pixels, b: Pixels) -> NDArray[np.float64]:
    """How far each value is off, [images, values]."""
    return np.abs(a.astype(float) - b.astype(float)).reshape(len(a), -1)


def agree(a: Pixels, b: Pixels) -> bool:
    off = distance(a, b)
    return bool((off > 4).mean() <= 0.01 and off.mean(axis=1).max() <= 2.0)


@pytest.mark.parametrize("view", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(
    ("way", "n", "interpolation", "size"),
    [
        (by_definition, 24, "bicubic", 16),
        (by_definition, 24, "bilinear", 32),
        (by_definition, 12, "bicubic", 96),
        (by_kernels, 2, "bilinear", 16),
        pytest.param(by_kernels, 4, "bicubic", 24, marks=pytest.mark.slow),
        pytest.param(by_dali, 24, "bilinear", 32, marks=needs_dali),
        pytest.param(by_dali, 12, "bicubic", 96, marks=needs_dali),
    ],
)
def test_views_are_pillows(
    photographs: Pixels, noise: Pixels, view: ViewConfig, way: Way, n: int,
    interpolation: Interpolation, size: int,
) -> None:  # fmt: skip
    """DALI repeats the window's edge at a view's border, which shows too much in noise."""
    augment = AugmentConfig(size=size, interpolation=interpolation)
    for images in [photographs[:n], noise[:n]][: 1 if way is by_dali else 2]:
        p = draw(images, view)
        assert agree(way(images, p, augment), by_pillow(images, p, augment))


@EVERY_WAY
@pytest.mark.parametrize("view", ["byol", "distorted"])
def test_views_of_one_channel_are_pillows(photographs: Pixels, view: str, way: Way, n: int) -> None:
    augment = AugmentConfig(size=16, mean=(0.5,), std=(0.5,))
    grey = np.ascontiguousarray(photographs[:n, ..., :1])
    p = draw(grey, RECIPES[view])
    assert agree(way(grey, p, augment), by_pillow(grey, p, augment))


@EVERY_WAY
@pytest.mark.parametrize(
    ("change", "mean", "most"),
    [
        ({"crop_scale": (0.08, 1), "crop_ratio": (0.5, 2)}, 0.05, 1),
        ({"rotate": 30, "shear": 20}, 0.02, 1),
        ({"jitter": 1, "brightness": 0.4}, 0.1, 1),
        ({"jitter": 1, "contrast": 0.4}, 0.1, 1),
        ({"jitter": 1, "saturation": 0.4}, 0.1, 1),
        ({"jitter": 1, "hue": 0.1}, 0.05, 7),  # an 8-bit hue off by one turns color by 6 levels
        ({"jitter": 1, "hue": 0.5}, 0.05, 7),
        ({"grey": 1}, 0.02, 1),
        ({"blur": 1}, 0.02, 1),
        ({"solarize": 1}, 0, 0),
        ({"flip": 1}, 0, 0),
        ({}, 0, 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_step_alone_is_pillows(
    photographs: Pixels, noise: Pixels, change: dict[str, Any], mean: float, most: int,
    way: Way, n: int,
) -> None:  # fmt: skip
    square = np.concatenate((photographs[:n], noise[:n]))[:, :32, :32].copy()
    p, augment = draw(square, replace(STILL, **change)), AugmentConfig(size=32)
    expected = by_pillow(square, p, augment)
    off = distance(way(square, p, augment), expected)
    mean, most = (0.3, 4) if way is by_dali and "crop_scale" in change else (mean, most)
    assert off.mean(axis=1).max() <= mean and off.max() <= most
    if change:
        assert distance(expected, square).mean() > 1  # the step did something
    else:
        np.testing.assert_array_equal(expected, square)


def test_jitter_takes_its_steps_in_each_of_24_orders(photographs: Pixels) -> None:
    images, augment = photographs[:24], AugmentConfig(size=24)
    p = draw(images, ViewConfig(jitter=1, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2))
    p = replace(p, order=np.arange(len(JITTER_ORDERS)))
    assert agree(by_definition(images, p, augment), by_pillow(images, p, augment))


@EVERY_WAY
def test_pixels_outside_the_window_are_not_seen(photographs: Pixels, way: Way, n: int) -> None:
    images, augment = photographs[:n], AugmentConfig(size=16, interpolation="bicubic")
    p = draw(images, ViewConfig(crop_scale=(0.08, 0.5)))
    changed = np.full_like(images, 255)
    for i in range(n):
        rows = slice(p.top[i], p.top[i] + p.height[i])
        columns = slice(p.left[i], p.left[i] + p.width[i])
        changed[i, rows, columns] = images[i, rows, columns]
    np.testing.assert_array_equal(way(changed, p, augment), way(images, p, augment))


def test_a_step_of_all_images_may_be_followed_by_one_of_some(photographs: Pixels) -> None:
    images, augment = photographs[:24], AugmentConfig(size=24)
    p = draw(images, replace(FULL, grey=1, blur=0.5, flip=1, solarize=0.5))
    assert agree(by_definition(images, p, augment), by_pillow(images, p, augment))


# ---- controls: the comparison must notice ----------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p: replace(p, hue=np.zeros(len(p.hue))),
        lambda p: replace(p, hue=-p.hue),
        lambda p: replace(p, order=np.zeros_like(p.order)),
        lambda p: replace(p, flip=p.flip ^ (np.arange(len(p.flip)) == 3)),
    ],
    ids=["no hue", "hue turned back", "fixed order", "a wrong flip"],
)
def test_control_a_wrong_parameter_is_noticed(
    photographs: Pixels, wrong: Callable[[ViewParameters], ViewParameters]
) -> None:
    images, augment = photographs[:24], AugmentConfig(size=32)
    p = draw(images, replace(FULL, jitter=1))
    expected = by_pillow(images, p, augment)
    assert agree(by_definition(images, p, augment), expected)
    assert not agree(by_definition(images, wrong(p), augment), expected)


@needs_dali
@pytest.mark.parametrize("wrong", ["aliased", "twisted"])
def test_control_other_dali_pipelines_are_noticed(
    photographs: Pixels, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without antialias; and with DALI's own jitter, which turns hue in YIQ in a fixed order."""
    images, augment = photographs[:24], AugmentConfig(size=16)
    p = draw(images, ViewConfig(jitter=1))
    expected = by_pillow(images, p, augment)
    assert agree(by_dali(images, p, augment), expected)
    resize, resized = fn.resize, dali_graph.resized
    factors = np.stack([p.brightness, p.contrast, p.saturation, 360 * p.hue], 1).astype(np.float32)

    def twisted(*of: Any) -> Any:
        drawn = fn.external_source(source=lambda: list(factors))
        b, c, s, h = (drawn[i] for i in range(4))
        return fn.color_twist(resized(*of), brightness=b, contrast=c, saturation=s, hue=h)

    if wrong == "twisted":
        monkeypatch.setattr(dali_graph, "resized", twisted)
        p = replace(p, jitter=np.zeros_like(p.jitter))
    else:
        monkeypatch.setattr(fn, "resize", lambda x, **how: resize(x, **how | {"antialias": False}))
    off = distance(by_dali(images, p, augment), expected)
    assert (off > 4).mean() > 0.1


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


def test_views_are_normalized_last_in_float32_channels_last(photographs: Pixels) -> None:
    images, augment = photographs[:24], AugmentConfig(size=24)
    p, pixels = draw(images, FULL), torch.from_numpy(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a trainer's autocast must not reach here
        views = views_of_batch(pixels, p, augment)
    levels = by_definition(images, p, augment)
    expected = (levels / 255.0 - augment.mean) / augment.std
    np.testing.assert_allclose(views.permute(0, 2, 3, 1), expected, atol=2e-6)  # of order 4
    assert views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    worker_s = views_of_levels(torch.from_numpy(levels.copy()), augment, torch.device("cpu"))
    torch.testing.assert_close(worker_s, views, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("sigma", "size", "taps"),
    [(2, 224, 23), (2, 96, 23), (2, 32, 23), (1, 32, 13), (4, 224, 33), (2, 8, 15)],
)
def test_a_blur_is_as_wide_as_sigma_and_the_view_allow(sigma: float, size: int, taps: int) -> None:
    """23 taps up to sigma 2 is the window of DALI's blur in RDM's released code."""
    wide = replace(STILL, blur=1, blur_sigma=(0.1, sigma))
    narrow = replace(wide, blur_sigma=(0.1, 0.2))
    for views in ((wide, narrow), (narrow, wide)):
        augment = AugmentConfig(size=size, view1=views[0], view2=views[1])
        assert blur_taps(augment, size) == taps


@pytest.mark.parametrize("sigma", [0.5, 1, 2, 4])
@pytest.mark.parametrize("size", [32, 48])
def test_a_blur_is_the_gaussian_of_float64(sigma: float, size: int) -> None:
    """Rounding is half a level; what a kernel of 16 pixels cuts off at sigma 4 is 0.02."""
    image = natural(1, size, size)
    view = replace(STILL, blur=1, blur_sigma=(sigma, sigma))
    augment, p = AugmentConfig(size=size, view1=view, view2=view), draw(image, view)
    sides = (0, sigma, sigma, 0)
    exact = gaussian_filter(image.astype(float), sides, mode="mirror", truncate=20)
    for way in (by_pillow, by_definition, by_kernels):
        assert np.abs(way(image, p, augment) - exact).max() <= 0.525


@pytest.mark.parametrize("sigma", [1, 2, 4])
def test_a_blur_changes_as_many_levels_as_pillows(sigma: float) -> None:
    """Pillow rounds six box blurs, each by 0.29 levels (rms), and this blur rounds once: together
    a pixel differs by 0.6 + 0.25 levels on average. Three taps miss 1.2 levels at sigma 1."""
    image = natural(1, 32, 32)
    view = replace(STILL, blur=1, blur_sigma=(sigma, sigma))
    made = by_pillow(image, draw(image, view), AugmentConfig(view1=view, view2=view))
    pillow = np.asarray(Image.fromarray(image[0]).filter(ImageFilter.GaussianBlur(sigma)))
    expected = distance(pillow[None], image).mean()
    assert abs(distance(made, image).mean() - expected) <= 0.85 and expected > 6


@pytest.mark.parametrize("sigma", [0.1, 0.75, 1.3, 2.0])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [40, 224])
def test_an_image_is_blurred_as_by_torchvision(sigma: float, channels: int, size: int) -> None:
    """Both round a sum of float32: at most one level apart, where that sum is near a half."""
    square = np.ascontiguousarray(natural(1, size, size)[..., :channels])
    p = replace(draw(square, replace(STILL, blur=1)), sigma=np.array([sigma]))
    colors = {"mean": (0.5,) * channels, "std": (0.5,) * channels}
    got = by_pillow(square, p, AugmentConfig(size=size, **colors))
    planes = torch.from_numpy(square).permute(0, 3, 1, 2)
    expected = vision.gaussian_blur(planes, 23, [sigma, sigma]).permute(0, 2, 3, 1)
    off = distance(got, expected.numpy())
    assert off.max() <= 1 and off.mean() < 1e-3
