"""Images a second of each loader: decode, and two views of every image.

    torch, dali, resident   rdm_fast's loaders
    torchvision             DataLoader workers and torchvision's v2 transforms, as training scripts
                            have them: drawn in the worker, blur by v2.GaussianBlur
    torchvision-pil-blur    the same with Pillow's faster, approximate blur, as in SimSiam's script
    kornia                  decoding in workers, then kornia on the batch (if it is installed)

All with the same augmentations: SimSiam's for ImageNet at 224 pixels, for CIFAR at 32. The images
are made: 500 x 375 JPEG files, and 32 x 32 decoded ones, with the 1/f spectrum and the correlated
colors of photographs. A round is an epoch, after one that is not timed.
"""

import io
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from rdm_fast.config import AugmentConfig, Config, DataConfig
from rdm_fast.config.recipes import recipe
from rdm_fast.data import ImageSet, build_loader
from rdm_fast.data.images.sets import EncodedImages, PixelImages
from rdm_fast.data.views.augment import blur_taps
from rdm_fast.errors import Unavailable

Pixels = NDArray[np.uint8]
Epoch = Callable[[], int]
"""Goes through an epoch; returns the number of images."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORKERS = sorted({1, 2, min(8, os.cpu_count() or 1)})
COLORS = np.array([[1, 0.25, 0.1], [1, 0, -0.2], [1, -0.25, 0.1]])
"""Red, green and blue of three independent fields: one of lightness, two of color."""
ROUNDS = 3
BATCHES = 2000
CREEP_MB = 64.0


def natural(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """An image whose amplitudes fall with 1/f, as those of photographs do: [height, width, 3]."""
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / max(height, width))
    phase = rng.random((3, *amplitude.shape))
    fields = np.fft.irfft2(amplitude * np.exp(2j * np.pi * phase), s=(height, width))
    fields /= fields.std(axis=(1, 2), keepdims=True)
    levels = 118 + 58 * np.moveaxis(fields, 0, -1) @ COLORS.T
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def packed(images: Iterable[Pixels], n: int, **options: Any) -> EncodedImages:
    """n JPEG files of the images in turn."""
    files = []
    for pixels in images:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", **options)
        files.append(buffer.getvalue())
    files = [files[i % len(files)] for i in range(n)]
    data = np.frombuffer(b"".join(files), np.uint8)
    return EncodedImages(data, np.cumsum([0, *map(len, files)]), None, [], "made.npz")


@cache
def jpeg_images(n: int) -> EncodedImages:
    """500 x 375 JPEG files of some 125 kB; 48 different ones at most."""
    rng = np.random.default_rng(0)
    return packed((natural(rng, 375, 500) for _ in range(min(n, 48))), n, quality=90)


@cache
def natural_images(n: int, height: int = 32, width: int = 32) -> PixelImages:
    """Decoded images."""
    rng = np.random.default_rng(0)
    return PixelImages(np.stack([natural(rng, height, width) for _ in range(n)]), None, [])


def config_of(name: str, batch: int, loader: str = "auto", workers: int = 0) -> Config:
    config = recipe(name)
    data = DataConfig(name="arrays", loader=loader, workers=workers)  # type: ignore[arg-type]
    return replace(config, data=data, optim=replace(config.optim, global_batch=batch))


def ours(loader: str, name: str, images: ImageSet, batch: int, workers: int) -> Epoch:
    config = config_of(name, batch, loader, workers)
    try:
        made = build_loader(config, images, rank=0, world_size=1, device=DEVICE)
    except Unavailable as error:
        pytest.skip(str(error))
    return lambda: sum(len(batch.view1) for batch in made.epoch(0))


# ---- the others ------------------------------------------------------------------------------


class Files(Dataset[Any]):
    """Some views of each image, which Pillow decodes."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], Any], views: int):
        self.images, self.transform, self.views = images, transform, views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        image = Image.fromarray(self.images.read(i))
        return [self.transform(image) for _ in range(self.views)]


class PillowBlur:
    """The blur of MoCo's and SimSiam's scripts."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = torch.empty(1).uniform_(*self.sigma)
        return image.filter(ImageFilter.GaussianBlur(float(sigma)))


def torchvision(
    name: str, images: ImageSet, batch: int, workers: int, *, pillow_blur: bool = False
) -> Epoch:
    augment = config_of(name, batch).augment
    blur = PillowBlur(augment.view1.blur_sigma) if pillow_blur else None
    return epoch_of(Files(images, torchvision_view(augment, blur), 2), batch, workers)


def torchvision_view(
    augment: AugmentConfig, blur: Callable[..., Any] | None = None, dtype: torch.dtype = torch.float
) -> v2.Transform:
    """View 1 by torchvision's transforms; `blur` replaces its own."""
    view = augment.view1
    blur = blur or v2.GaussianBlur(blur_taps(augment, augment.size), view.blur_sigma)
    interpolation = v2.InterpolationMode(augment.interpolation)
    jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    return v2.Compose(
        [
            v2.RandomResizedCrop(augment.size, view.crop_scale, interpolation=interpolation),
            v2.RandomApply([jitter], view.jitter),
            v2.RandomGrayscale(view.grey),
            *([v2.RandomApply([blur], view.blur)] if view.blur else []),
            v2.RandomHorizontalFlip(view.flip),
            v2.ToImage(),
            v2.ToDtype(dtype, scale=True),
            v2.Normalize(augment.mean, augment.std),
        ]
    )


def epoch_of(
    data: Files, batch: int, workers: int, finish: Callable[[Tensor], Tensor] = lambda view: view
) -> Epoch:
    loader = DataLoader(
        data,
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=DEVICE.type == "cuda",
    )
    return lambda: sum(len(finish(views[0].to(DEVICE))) for views in loader)


def kornia(name: str, images: ImageSet, batch: int, workers: int) -> Epoch:
    view = kornia_view(config_of(name, batch).augment)

    def two_views(levels: Tensor) -> Tensor:
        x = levels.float() / 255
        view(x)
        return view(x)

    return epoch_of(Files(images, v2.PILToTensor(), 1), batch, workers, two_views)


def kornia_view(augment: AugmentConfig) -> Callable[[Tensor], Tensor]:
    """View 1 of a float batch, from 0 to 1, by kornia."""
    K = pytest.importorskip("kornia.augmentation", reason="kornia is not installed")
    view, S, taps = augment.view1, augment.size, blur_taps(augment, augment.size)
    chain: Callable[[Tensor], Tensor] = K.AugmentationSequential(
        K.RandomResizedCrop((S, S), view.crop_scale, resample=augment.interpolation.upper()),
        K.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter),
        K.RandomGrayscale(p=view.grey),
        *([K.RandomGaussianBlur((taps, taps), view.blur_sigma, p=view.blur)] if view.blur else []),
        K.RandomHorizontalFlip(p=view.flip),
        K.Normalize(torch.tensor(augment.mean), torch.tensor(augment.std)),
    )
    return chain


# ---- speed -----------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """CPU time of this process and of the workers that have ended."""
    return sum(os.times()[:4])


@pytest.fixture
def time_epochs(
    benchmark: BenchmarkFixture, record: Callable[[dict[str, Any]], None]
) -> Callable[[Epoch], None]:
    """time_epochs(epoch): rounds after one to warm up. Its row has images a second, and CPU time an
    image, which other programs disturb less."""

    def run(epoch: Epoch) -> None:
        if benchmark.disabled:
            benchmark(epoch)
            return
        images = epoch()
        before = cpu_seconds()
        benchmark.pedantic(epoch, rounds=ROUNDS, iterations=1)
        cpu_ms = 1000 * (cpu_seconds() - before) / (ROUNDS * images)
        record(
            {
                "median_s": benchmark.stats.stats.median,
                "iqr_s": benchmark.stats.stats.iqr,
                "rounds": ROUNDS,
                "iterations": 1,
                "images": images,
                "images_per_s": round(images / benchmark.stats.stats.median, 1),
                "cpu_ms_per_image": round(cpu_ms, 2),
                "load_average": os.getloadavg()[0],
            }
        )

    return run


RIVALS: dict[str, Callable[[str, ImageSet, int, int], Epoch]] = {
    "dali": lambda *of: ours("dali", *of),
    "torch": lambda *of: ours("torch", *of),
    "torchvision": torchvision,
    "torchvision-pil-blur": lambda *of: torchvision(*of, pillow_blur=True),
    "kornia": kornia,
}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("loader", RIVALS)
def bench_jpeg(
    benchmark: BenchmarkFixture, time_epochs: Callable[[Epoch], None], loader: str, workers: int
) -> None:
    """500 x 375 JPEG files to two views of 224 pixels, SimSiam's augmentations for ImageNet."""
    if benchmark.disabled and workers > 1:
        pytest.skip("once is enough to see that it runs")
    n, batch = (4, 2) if benchmark.disabled else (192, 64)
    time_epochs(RIVALS[loader]("imagenet_simsiam", jpeg_images(n), batch, workers))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("loader", ["resident", *RIVALS])
def bench_small(
    benchmark: BenchmarkFixture, time_epochs: Callable[[Epoch], None], loader: str, workers: int
) -> None:
    """Decoded 32 x 32 images to two views, SimSiam's augmentations for CIFAR (without blur)."""
    if loader == "torchvision-pil-blur" or (workers > 1 and loader == "resident"):
        pytest.skip("the same as another")
    if benchmark.disabled and workers > 1:
        pytest.skip("once is enough to see that it runs")
    n, batch = (16, 8) if benchmark.disabled else (2048, 256)
    of = ("cifar10_simsiam", natural_images(n), batch, workers)
    time_epochs(ours("resident", *of) if loader == "resident" else RIVALS[loader](*of))


# ---- memory ----------------------------------------------------------------------------------


def resident_mb() -> float:
    """Memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("loader", ["resident", "dali", "torch"])
def bench_memory(benchmark: BenchmarkFixture, loader: str) -> None:
    """Memory stays the same over 2,000 batches, after a fifth of them."""
    batches = 10 if benchmark.disabled else BATCHES
    images = (
        natural_images(160) if loader == "resident" else packed(natural_images(160).pixels, 160)
    )
    epoch = ours(loader, "cifar10_byol", images, 16, 0)
    sizes = []
    for _ in range(batches // 10):
        epoch()
        sizes.append(resident_mb())
    benchmark.extra_info["mb"] = [round(size, 1) for size in sizes]
    growth = sizes[-1] - sizes[len(sizes) // 5]
    assert growth <= CREEP_MB, f"{growth:.0f} MB more than after a fifth of {batches} batches"
    benchmark(lambda: None)  # the question is memory, not time
