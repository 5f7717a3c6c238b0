"""rdm_fast.data.images.sets: all ways of keeping images read alike; what the digest covers."""

import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from rdm_fast.data.images.sets import ImageSet, PixelImages, decoded_once
from tests.data.files import encode, natural, packed, put, read_folder


def test_three_ways_of_keeping_images_read_alike(tmp_path: Path) -> None:
    files = [encode(Image.fromarray(pixels), "JPEG") for pixels in natural(5, 8, 12)]
    for i, data in enumerate(files):
        put(tmp_path / f"{i}.jpg", data)
    in_files, encoded = read_folder(tmp_path), packed(files)
    decoded = decoded_once(encoded)
    assert decoded.pixels is not None and decoded.pixels.shape == (5, 8, 12, 3)
    for images in (in_files, encoded, decoded):
        assert len(images) == 5 and images.sizes.tolist() == [[8, 12]] * 5
        for i in range(5):
            np.testing.assert_array_equal(images.read(i), in_files.read(i))


def test_large_images_and_those_of_several_sizes_stay_encoded(jpeg_files: list[bytes]) -> None:
    assert decoded_once(packed(jpeg_files)).pixels is None
    large = encode(Image.new("RGB", (97, 8)), "JPEG")
    assert decoded_once(packed([large, large])).pixels is None


def test_the_digest_tells_sets_apart_and_survives_pickling(photographs: np.ndarray) -> None:
    pixels, labels = photographs[:8], np.arange(8)
    names = [str(i) for i in range(8)]
    base = PixelImages(pixels, labels, names)
    changed = pixels.copy()
    changed[3, 2, 1, 0] ^= 1
    others: list[ImageSet] = [
        PixelImages(changed, labels, names),
        PixelImages(pixels, labels[::-1].copy(), names),
        PixelImages(pixels, None, names),
        PixelImages(pixels[:7], labels[:7], names),
        PixelImages(pixels.reshape(8, 48, 40, 3), labels, names),
    ]
    digests = {images.digest for images in [base, *others]}
    assert len(digests) == 6
    assert PixelImages(pixels.copy(), labels, names).digest == base.digest
    assert pickle.loads(pickle.dumps(base)).digest == base.digest
