"""Evaluation batches: every image once over all ranks, resized and cropped as by torchvision."""

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from rdm_fast.config import AugmentConfig, DataConfig
from rdm_fast.data import evaluation_batches, load
from rdm_fast.data.images.sets import PixelImages
from rdm_fast.errors import UsageError
from tests.data.files import packed

CPU = torch.device("cpu")


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_each_image_is_shown_once(world: int, workers: int, photographs: NDArray[np.uint8]) -> None:
    images, augment = PixelImages(photographs[:24], None, []), AugmentConfig(size=16)
    seen = [
        indices
        for rank in range(world)
        for _, indices in evaluation_batches(
            images, augment, batch=7, device=CPU, rank=rank, world_size=world, workers=workers
        )
    ]
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(24))


def test_evaluation_leaves_images_of_the_right_size_alone() -> None:
    digits = load(DataConfig(name="digits"), "test")
    augment = AugmentConfig(size=16, mean=(0.3,), std=(0.4,))
    views, indices = next(evaluation_batches(digits, augment, batch=5, device=CPU))
    assert digits.pixels is not None
    expected = (digits.pixels[indices.numpy()].transpose(0, 3, 1, 2) / 255 - 0.3) / 0.4
    np.testing.assert_allclose(views.numpy(), expected, atol=1e-6)
    assert views.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(UsageError, match=r"--augment\.mean"):
        next(evaluation_batches(digits, AugmentConfig(size=16), batch=4, device=CPU))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "short"), [(16, 16), (32, 32), (64, 73), (96, 110)])
def test_as_torchvision(size: int, short: int, interpolation: str, jpeg_files: list[bytes]) -> None:
    augment = AugmentConfig(size=size, interpolation=interpolation)
    theirs = Compose([Resize(short, InterpolationMode(interpolation)), CenterCrop(size)])
    std, mean = (np.reshape(x, (3, 1, 1)) for x in (augment.std, augment.mean))
    for views, indices in evaluation_batches(packed(jpeg_files), augment, batch=3, device=CPU):
        for view, i in zip(views, indices.tolist(), strict=True):
            expected = np.asarray(theirs(Image.open(io.BytesIO(jpeg_files[i]))))
            got = np.rint((view.numpy() * std + mean) * 255)
            np.testing.assert_array_equal(got.transpose(1, 2, 0), expected)
