"""Made images, and folders of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.files import Pixels, encode, good_images, natural


@pytest.fixture(scope="session")
def photographs() -> Pixels:
    return natural(96, 40, 48)


@pytest.fixture(scope="session")
def noise() -> Pixels:
    return np.random.default_rng(1).integers(0, 256, (96, 40, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def jpeg_files() -> list[bytes]:
    """Eight JPEG files of four sizes."""
    made = [natural(1, 40 + 8 * (i % 4), 100 - 16 * (i % 4), seed=i)[0] for i in range(8)]
    return [encode(Image.fromarray(pixels), "JPEG", quality=95) for pixels in made]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return good_images(tmp_path / "data")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "bad_files.tsv"
