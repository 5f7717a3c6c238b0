"""The Triton kernels of `augment_views` against torchvision and Pillow, with the same parameters.

As test_augment.py has it for the definition: at most 1 % of values off by more than 4 levels, no
image by more than 2 on average; single steps closer; and controls that must be noticed. Few and
small images: without a GPU the kernels run in Triton's interpreter.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from rdm_fast.config import (
    AugmentConfig,
    Config,
    DataConfig,
    Interpolation,
    OptimConfig,
    Precision,
    ViewConfig,
)
from rdm_fast.data import build_loader
from rdm_fast.data.images.sets import PixelImages
from rdm_fast.data.views.augment import blur_taps, view_of_image, view_table
from rdm_fast.data.views.sampler import ViewParameters, draw_views
from rdm_kernels.views.op import augment_views_triton

Pixels = NDArray[np.uint8]
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


def by_kernels(images: Pixels, p: ViewParameters, augment: AugmentConfig) -> Pixels:
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).to(DEVICE)
    table = view_table([p], np.arange(len(images))).to(DEVICE)
    levels = augment_views_triton(
        planes, table, augment.size, augment.interpolation, blur_taps(augment.size),
        augment.mean, augment.std, torch.uint8,
    )  # fmt: skip
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def distance(a: Pixels, b: Pixels) -> NDArray[np.float64]:
    return np.abs(a.astype(float) - b.astype(float)).reshape(len(a), -1)


def agree(a: Pixels, b: Pixels) -> bool:
    off = distance(a, b)
    return bool((off > 4).mean() <= 0.01 and off.mean(axis=1).max() <= 2.0)


@pytest.fixture(params=["photographs", "noise"])
def images(request: pytest.FixtureRequest) -> Pixels:
    found: Pixels = request.getfixturevalue(request.param)
    return found[:6]


@pytest.fixture
def squares(images: Pixels) -> Pixels:
    return np.ascontiguousarray(images[:, :32, :32])


@pytest.mark.parametrize("view", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(
    ("interpolation", "size"), [("bilinear", 16), ("bicubic", 24), ("bilinear", 32)]
)
def test_kernels_and_pillow_give_the_same_views(
    images: Pixels, view: ViewConfig, interpolation: Interpolation, size: int
) -> None:
    augment = AugmentConfig(size=size, interpolation=interpolation)
    p = draw(images, view)
    assert agree(by_kernels(images, p, augment), by_pillow(images, p, augment))


@pytest.mark.parametrize("view", RECIPES.values(), ids=RECIPES)
def test_kernels_and_pillow_agree_on_one_channel(images: Pixels, view: ViewConfig) -> None:
    augment = AugmentConfig(size=16, mean=(0.5,), std=(0.5,))
    grey, p = np.ascontiguousarray(images[..., :1]), draw(images, view)
    assert agree(by_kernels(grey, p, augment), by_pillow(grey, p, augment))


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
    squares: Pixels, change: dict[str, Any], mean: float, most: int
) -> None:
    p, augment = draw(squares, replace(STILL, **change)), AugmentConfig(size=32)
    expected = by_pillow(squares, p, augment)
    off = distance(by_kernels(squares, p, augment), expected)
    assert off.mean(axis=1).max() <= mean and off.max() <= most
    assert distance(expected, squares).mean() > 1  # the step did something


# ---- controls: the comparison must notice ----------------------------------------------------


def test_control_antialias_off_is_noticed(images: Pixels) -> None:
    augment, p = AugmentConfig(size=16), draw(images, STILL)
    window = [int(side[0]) for side in (p.top, p.left, p.height, p.width)]
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    aliased = vision.resized_crop(
        tensor, *window, [16, 16], interpolation=InterpolationMode.BILINEAR, antialias=False
    )
    assert not agree(by_kernels(images, p, augment), aliased.permute(0, 2, 3, 1).numpy())


def test_control_wrong_hue_is_noticed(images: Pixels) -> None:
    augment, p = AugmentConfig(size=16), draw(images, RECIPES["simsiam"])
    wrong = replace(p, hue=-p.hue)
    assert not agree(by_kernels(images, wrong, augment), by_pillow(images, p, augment))


def test_control_wrong_flip_coin_is_noticed(images: Pixels) -> None:
    augment, p = AugmentConfig(size=16), draw(images, FULL)
    wrong = replace(p, flip=np.concatenate([~p.flip[:1], p.flip[1:]]))
    assert not agree(by_kernels(images, wrong, augment), by_pillow(images, p, augment))


# ---- the resident loader on a GPU ------------------------------------------------------------


def resident(images: Pixels, device: str, precision: Precision) -> Any:
    view = ViewConfig(crop_scale=(0.2, 1), jitter=0.8, grey=0.2, blur=0.5, flip=0.5)
    config = Config(
        data=DataConfig(name="arrays", loader="resident"),
        augment=AugmentConfig(size=32, view1=view, view2=replace(view, solarize=0.2)),
        optim=OptimConfig(global_batch=16),
        precision=precision,
    )
    return build_loader(
        config, PixelImages(images, None, []), rank=0, world_size=1, device=torch.device(device)
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_a_gpu_is_shown_what_a_cpu_is_shown(
    photographs: Pixels, precision: Precision, dtype: torch.dtype
) -> None:
    there = resident(photographs, "cuda", precision).epoch(1)
    here = resident(photographs, "cpu", precision).epoch(1)
    for a, b in zip(there, here, strict=True):
        assert torch.equal(a.indices, b.indices) and torch.equal(a.labels.cpu(), b.labels)
        for x, y in ((a.view1, b.view1), (a.view2, b.view2)):
            assert x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last)
            # of order 3; a level is 1 / (255 std) = 0.018, and but for ties all are equal
            off = (x.cpu().float() - y).abs() > 1e-5 + 3 * torch.finfo(dtype).eps / 2
            assert off.double().mean() <= 1e-3


@pytest.mark.gpu
def test_no_batch_waits_for_the_gpu(photographs: Pixels) -> None:
    batches = resident(photographs, "cuda", "bf16").epoch(0)
    next(batches)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(batches)) == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")
