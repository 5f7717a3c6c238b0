"""The DALI loader's pixels against torchvision's and Pillow's, with the same parameters.

At most 1 % of values may be off by more than 4 levels, and no image by more than 2 on average; a
step alone is held to what its rounding allows. Only resizing differs by more than rounding: at the
border of a view DALI repeats the window's edge, where Pillow leaves out what lies beyond it. The
controls show that this notices what other DALI pipelines do: hue in YIQ and a fixed order, no
antialias, a wrong coin.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from rdm_fast.config import AugmentConfig, Config, Interpolation, OptimConfig, ViewConfig
from rdm_fast.config.recipes import RECIPES
from rdm_fast.data.images.sets import EncodedImages, ImageSet, PixelImages
from rdm_fast.data.loaders.batch import draw_all_views
from rdm_fast.data.loaders.dali_input import Source, file_for_dali, window
from rdm_fast.data.loaders.dali_loader import finished
from rdm_fast.data.views.augment import view_of_image, view_table
from rdm_fast.data.views.sampler import JITTER_ORDERS, ViewParameters
from tests.data.conftest import natural
from tests.data.loaders.dali_here import HERE, needs_dali

if HERE:
    from nvidia.dali import fn

    from rdm_fast.data.loaders import dali_graph

pytestmark = needs_dali

Pixels = NDArray[np.uint8]

STILL = ViewConfig(
    crop_scale=(1, 1), crop_ratio=(1, 1), brightness=0, contrast=0, saturation=0, hue=0
)  # crops the whole of a square image and leaves it alone
FULL = ViewConfig(crop_scale=(0.08, 1), jitter=0.8, grey=0.2, blur=0.5, solarize=0.2, flip=0.5)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def packed(files: list[bytes]) -> EncodedImages:
    data = np.frombuffer(b"".join(files), np.uint8)
    return EncodedImages(data, np.cumsum([0, *map(len, files)]), None, [], "test.npz")


@pytest.fixture(scope="module")
def photographs_jpeg() -> ImageSet:
    """48 photographs of many sizes, with chroma at full and at half resolution."""
    rng = np.random.default_rng(0)
    sides = rng.integers(60, 160, (48, 2))
    return packed(
        [
            save(Image.fromarray(natural(1, h, w, seed)[0]), "JPEG", subsampling=2 * (seed % 2))
            for seed, (h, w) in enumerate(sides)
        ]
    )


def with_dali(
    images: ImageSet, parameters: Sequence[ViewParameters], augment: AugmentConfig
) -> list[Pixels]:
    """All views of all images, as levels."""
    encoded = images.pixels is None
    made = list(images.pixels) if images.pixels is not None else [
        file_for_dali(images, i) for i in range(len(images))
    ]  # fmt: skip

    def source(info: object) -> list[Any]:
        return [made, *(array for p in parameters for array in window(p))]

    pipeline = dali_graph.pipeline_of_crops(
        source,
        augment.sizes,
        augment.interpolation,
        batch=len(images),
        threads=1,
        device_id=None,
        encoded=encoded,
    )
    crops = [torch.from_numpy(np.array(crop.as_array())) for crop in pipeline.run()]
    levels = [
        finished([crop], [p], augment, size, torch.uint8)[0].permute(0, 2, 3, 1).numpy()
        for crop, p, size in zip(crops, parameters, augment.sizes, strict=True)
    ]
    together = finished(crops[:2], parameters[:2], augment, augment.size, torch.uint8)
    for one, both_at_once in zip(levels, together, strict=False):
        np.testing.assert_array_equal(one, both_at_once.permute(0, 2, 3, 1))
    return levels


def with_pillow(
    images: ImageSet, parameters: list[ViewParameters], augment: AugmentConfig
) -> list[Pixels]:
    return [
        np.stack([view_of_image(images.read(i), p, i, augment, size) for i in range(len(images))])
        for p, size in zip(parameters, augment.sizes, strict=True)
    ]


def draw(images: ImageSet, augment: AugmentConfig) -> list[ViewParameters]:
    config = replace(RECIPES["cifar10_byol"](), augment=augment)
    return draw_all_views(config, images, 0, np.arange(len(images)))


def both(view: ViewConfig, size: int = 32, **changes: Any) -> AugmentConfig:
    return AugmentConfig(size=size, view1=view, view2=view, **changes)


def distance(a: list[Pixels], b: list[Pixels]) -> NDArray[np.float64]:
    """How far each value is off, [images, values]."""
    x, y = np.concatenate(a).astype(float), np.concatenate(b).astype(float)
    return np.abs(x - y).reshape(len(x), -1)


def test_small_views_agree(photographs: Pixels) -> None:
    images = PixelImages(photographs, None, [])
    augment = replace(both(FULL), small_views=2, small_size=12)
    p = draw(images, augment)
    made, expected = with_dali(images, p, augment), with_pillow(images, p, augment)
    assert [view.shape[1] for view in made] == [32, 32, 12, 12]
    assert agree(distance(made[2:], expected[2:]))


def agree(off: NDArray[np.float64]) -> bool:
    return bool((off > 4).mean() <= 0.01 and off.mean(axis=1).max() <= 2.0)


# ---- the whole chain -------------------------------------------------------------------------

WHOLE = {
    "cifar10_byol": 32,
    "imagenet_simsiam": 96,
    "imagenet100_byol": 64,
}


@pytest.mark.parametrize(("recipe", "size"), WHOLE.items(), ids=WHOLE)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views_of_recipes_agree(
    recipe: str, size: int, interpolation: Interpolation, photographs_jpeg: ImageSet
) -> None:
    augment = replace(RECIPES[recipe]().augment, size=size, interpolation=interpolation)
    p = draw(photographs_jpeg, augment)
    off = distance(
        with_dali(photographs_jpeg, p, augment), with_pillow(photographs_jpeg, p, augment)
    )
    assert agree(off)


def test_distorted_views_agree(photographs: Pixels) -> None:
    images = PixelImages(photographs, None, [])
    augment = both(replace(FULL, rotate=20, shear=12))
    p = draw(images, augment)
    assert agree(distance(with_dali(images, p, augment), with_pillow(images, p, augment)))


def test_grey_images_agree(photographs: Pixels) -> None:
    images = PixelImages(np.ascontiguousarray(photographs[..., :1]), None, [])
    augment = both(replace(FULL, rotate=20, shear=12), mean=(0.5,), std=(0.5,))
    p = draw(images, augment)
    off = distance(with_dali(images, p, augment), with_pillow(images, p, augment))
    assert agree(off) and off.mean() <= 0.25


# ---- each step -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "mean", "most"),
    [
        ({"crop_scale": (0.08, 1), "crop_ratio": (0.5, 2)}, 0.3, 4),
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
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_step_alone_agrees(
    photographs: Pixels, noise: Pixels, change: dict[str, Any], mean: float, most: int
) -> None:
    square = np.concatenate((photographs, noise))[:, :32, :32]
    images = PixelImages(square, None, [])
    augment = both(replace(STILL, **change))
    p = draw(images, augment)
    expected = with_pillow(images, p, augment)
    off = distance(with_dali(images, p, augment), expected)
    assert off.mean(axis=1).max() <= mean and off.max() <= most
    assert distance(expected, [square, square]).mean() > 1  # the step did something


@pytest.mark.parametrize("order", range(0, 24, 5))
def test_jitter_takes_its_steps_in_the_drawn_order(order: int, photographs: Pixels) -> None:
    images = PixelImages(photographs[:24], None, [])
    view = ViewConfig(jitter=1, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    augment = both(view)
    p1, p2 = draw(images, augment)
    p1 = replace(p1, order=np.full(24, order))
    back = (JITTER_ORDERS[order, ::-1] == JITTER_ORDERS).all(axis=1).argmax()
    p2 = replace(p2, order=np.full(24, back))
    off = distance(with_dali(images, (p1, p2), augment), with_pillow(images, (p1, p2), augment))
    assert agree(off)


def test_no_augmentation_returns_the_image(noise: Pixels) -> None:
    square = noise[:, :32, :32]
    images = PixelImages(square, None, [])
    views = with_dali(images, draw(images, both(STILL)), both(STILL))
    assert distance(views, [square, square]).max() == 0


def test_pixels_outside_the_window_are_not_seen(photographs: Pixels) -> None:
    augment = both(ViewConfig(crop_scale=(0.08, 0.5)), interpolation="bicubic")
    images = PixelImages(photographs, None, [])
    p, _ = draw(images, augment)
    changed = np.full_like(photographs, 255)
    for i in range(len(p)):
        rows = slice(p.top[i], p.top[i] + p.height[i])
        columns = slice(p.left[i], p.left[i] + p.width[i])
        changed[i, rows, columns] = photographs[i, rows, columns]
    window = PixelImages(changed, None, [])
    a, b = (with_dali(source, (p, p), augment) for source in (images, window))
    np.testing.assert_array_equal(a[0], b[0])


# ---- controls: the comparison must notice ----------------------------------------------------


def test_control_color_twist_is_noticed(
    photographs_jpeg: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI's own jitter, one matrix for all four steps, where the crop is made."""
    augment = both(ViewConfig(jitter=1))
    p = draw(photographs_jpeg, augment)
    expected = with_pillow(photographs_jpeg, p, augment)
    assert agree(distance(with_dali(photographs_jpeg, p, augment), expected))
    resized, drawn = dali_graph.resized, [*p]

    def twisted(*of: Any) -> Any:
        view = drawn.pop(0)
        factors = fn.external_source(
            source=lambda: [
                np.float32([b, c, s, 360 * h])
                for b, c, s, h in zip(
                    view.brightness, view.contrast, view.saturation, view.hue, strict=True
                )
            ]
        )
        b, c, s, h = (factors[i] for i in range(4))
        return fn.color_twist(resized(*of), brightness=b, contrast=c, saturation=s, hue=h)

    monkeypatch.setattr(dali_graph, "resized", twisted)
    still = [replace(view, jitter=np.zeros_like(view.jitter)) for view in p]
    off = distance(with_dali(photographs_jpeg, still, augment), expected)
    assert not agree(off) and (off > 4).mean() > 0.1


def test_control_antialias_off_is_noticed(
    photographs_jpeg: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize = fn.resize
    monkeypatch.setattr(fn, "resize", lambda x, **how: resize(x, **how | {"antialias": False}))
    augment = both(STILL, size=16)
    p = draw(photographs_jpeg, augment)
    off = distance(
        with_dali(photographs_jpeg, p, augment), with_pillow(photographs_jpeg, p, augment)
    )
    assert not agree(off)


def test_control_wrong_flip_coin_is_noticed(photographs_jpeg: ImageSet) -> None:
    augment = both(ViewConfig(flip=0.5))
    right, wrong = (draw(photographs_jpeg, both(ViewConfig(flip=coin))) for coin in (0.5, 0.6))
    expected = with_pillow(photographs_jpeg, right, augment)
    assert agree(distance(with_dali(photographs_jpeg, right, augment), expected))
    assert not agree(distance(with_dali(photographs_jpeg, wrong, augment), expected))


# ---- encoded images --------------------------------------------------------------------------


def kinds() -> dict[str, bytes]:
    """The same image in many kinds of file."""
    image = Image.fromarray(natural(1, 48, 48)[0])
    levels = np.asarray(image.convert("L"))
    see_through = image.convert("RGBA")
    see_through.putalpha(Image.fromarray(levels))
    turned = Image.Exif()
    turned[0x112] = 6  # orientation
    return {
        "jpeg": save(image, "JPEG"),
        "jpeg, progressive, half chroma": save(image, "JPEG", progressive=True, subsampling=2),
        "jpeg, grey": save(image.convert("L"), "JPEG"),
        "jpeg, cmyk": save(image.convert("CMYK"), "JPEG"),
        "jpeg, turned by exif": save(image, "JPEG", exif=turned),
        "jpeg, bytes after its end": save(image, "JPEG") + b"more",
        "png": save(image, "PNG"),
        "png, grey": save(image.convert("L"), "PNG"),
        "png, palette": save(image.convert("P"), "PNG"),
        "png, transparent": save(see_through, "PNG"),
        "png, one bit": save(image.convert("1"), "PNG"),
        "png, sixteen bits": save(Image.fromarray(levels.astype(np.uint16) * 257), "PNG"),
        "gif": save(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "webp": save(image, "WEBP", lossless=True),
        "bmp": save(image, "BMP"),
        "tiff": save(image, "TIFF"),
        "one pixel": save(image.resize((1, 1)), "JPEG"),
    }


@pytest.mark.parametrize("kind", kinds())
def test_files_of_every_kind_are_decoded_to_pillows_pixels(kind: str) -> None:
    images, augment = packed([kinds()[kind]]), both(STILL, size=48)
    p = draw(images, augment)
    made, expected = with_dali(images, p, augment), with_pillow(images, p, augment)
    np.testing.assert_array_equal(made, expected)


# ---- the parameters that are fed -------------------------------------------------------------


@dataclass
class Asked:
    """DALI's BatchInfo."""

    iteration: int


def tables(world: int, epoch: int, start: int, images: ImageSet) -> dict[int, list[bytes]]:
    """What DALI is fed with for each image of an epoch from a step on, over all ranks."""
    config = Config(
        augment=both(FULL), optim=OptimConfig(global_batch=8), data=RECIPES["cifar10_byol"]().data
    )
    rows: dict[int, list[bytes]] = {}
    for rank in range(world):
        source = Source(config, images, rank, world, by_pillow=set())
        source.plan(epoch, start)
        for iteration in range(source.steps_per_epoch - start):
            files, *windows = source(Asked(iteration))
            indices, drawn = source.fed(start + iteration)
            np.testing.assert_array_equal(indices, source.asked(start + iteration))
            for p, corner, sides in zip(drawn, windows[::2], windows[1::2], strict=True):
                np.testing.assert_array_equal(corner, np.stack((p.top, p.left), axis=1))
                np.testing.assert_array_equal(sides, np.stack((p.height, p.width), axis=1))
            table = view_table(drawn, indices).reshape(-1, len(drawn), len(indices))
            for row, i in enumerate(indices.tolist()):
                assert i not in rows
                rows[i] = [files[row].tobytes(), table[:, :, row].numpy().tobytes()]
        with pytest.raises(StopIteration):
            source(Asked(source.steps_per_epoch - start))
    return rows


@pytest.mark.parametrize("world", [2, 4])
def test_each_image_is_fed_with_the_same_at_any_number_of_ranks(
    world: int, photographs_jpeg: ImageSet
) -> None:
    one = tables(1, 1, 0, photographs_jpeg)
    assert len(one) == 48 and tables(world, 1, 0, photographs_jpeg) == one
    assert tables(1, 2, 0, photographs_jpeg) != one


def test_each_image_is_fed_with_the_same_after_a_resume(photographs_jpeg: ImageSet) -> None:
    whole, rest = (tables(2, 1, start, photographs_jpeg) for start in (0, 4))
    assert len(rest) == 16 and rest == {i: whole[i] for i in rest}
