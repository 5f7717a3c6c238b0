"""Made images: smooth areas, edges and texture, as photographs have; and pure noise."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def natural(n: int, height: int, width: int, seed: int = 0) -> Pixels:
    """[n, height, width, 3]: soft colors, a few hard-edged boxes, a little grain."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(n):
        soft = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        image = np.array(soft.resize((width, height), Image.Resampling.BICUBIC), np.float64)
        for _ in range(3):
            top, left = rng.integers(0, height), rng.integers(0, width)
            image[top : top + height // 3, left : left + width // 3] = rng.integers(0, 256, 3)
        images.append(image + rng.normal(0, 4, image.shape))
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def photographs() -> Pixels:
    return natural(96, 40, 48)


@pytest.fixture(scope="session")
def noise() -> Pixels:
    return np.random.default_rng(1).integers(0, 256, (96, 40, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def jpeg_files() -> list[bytes]:
    """Eight JPEG files of four sizes."""
    files = []
    for i in range(8):
        buffer = io.BytesIO()
        height, width = 40 + 8 * (i % 4), 100 - 16 * (i % 4)
        Image.fromarray(natural(1, height, width, seed=i)[0]).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    return files
