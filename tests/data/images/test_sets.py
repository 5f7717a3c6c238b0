"""sets: what Pillow makes of odd files, and one clear sentence for bad ones."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdm_fast.data.images.decode import Header, decode, look
from rdm_fast.data.images.index import Found, build
from rdm_fast.data.images.sets import EncodedImages, FileImages, ImageSet, PixelImages
from rdm_fast.errors import DataError


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
ORIENTED = Image.Exif()
ORIENTED[0x0112] = 6  # to be turned by 90 degrees for display

ODD = {
    "grey": encode(RGB.convert("L")),
    "one bit": encode(RGB.convert("1")),
    "palette": encode(RGB.convert("P")),
    "transparent": encode(RGB.convert("RGBA")),
    "cmyk": encode(RGB.convert("CMYK"), "JPEG"),
    "webp": encode(RGB, "WEBP"),
    "gif": encode(RGB.convert("P"), "GIF"),
    "tiff": encode(RGB, "TIFF"),
    "turned by EXIF": encode(RGB, "JPEG", exif=ORIENTED),
}


def on_disk(root: Path, names: list[str]) -> FileImages:
    """Files of a folder, as the scan and the index hand them over."""
    found = []
    for name in names:
        status = (root / name).stat()
        found.append(Found(name, status.st_size, status.st_mtime_ns))
    return FileImages(root, build(root, found, full=False), None, [])


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_every_mode_becomes_rgb_as_pillow_converts_it(data: bytes) -> None:
    pixels = decode(io.BytesIO(data), "x")
    assert pixels.shape == (6, 9, 3) and pixels.dtype == np.uint8
    seen = look(io.BytesIO(data), full=False)
    assert isinstance(seen, Header) and (seen.height, seen.width) == (6, 9)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(pixels, expected)


def test_transparency_is_dropped_and_of_16_bits_the_high_byte_is_taken() -> None:
    clear = RGB.copy()
    clear.putalpha(0)
    np.testing.assert_array_equal(decode(io.BytesIO(encode(clear)), "x"), np.asarray(RGB))
    deep = np.array([[0, 7, 255, 256, 65535]], np.uint16)
    for form in ("PNG", "TIFF"):
        levels = decode(io.BytesIO(encode(Image.fromarray(deep), form)), "x")
        assert levels.tolist() == [[[v] * 3 for v in (0, 0, 0, 1, 255)]]


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(RGB))
    images = on_disk(tmp_path, ["a.png"])
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png .*no such file"):
        images.read(0)


def test_odd_file_names_survive(tmp_path: Path) -> None:
    names = ["ü ñ 图.png", "-rf.png", "new\nline.png", "tab\t.png", "\udcff.png"]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(encode(RGB.resize((2 + i, 3))))
    images = on_disk(tmp_path, names)
    assert images.sizes.tolist() == [[3, 2 + i] for i in range(len(names))]
    assert [images.path(i).name for i in range(len(names))] == names


def packed(files: list[bytes]) -> EncodedImages:
    encoded = np.frombuffer(b"".join(files), np.uint8)
    offsets = np.cumsum([0, *map(len, files)])
    return EncodedImages(encoded, offsets, None, [], "test.npz")


def test_three_ways_of_keeping_images_read_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = [
        encode(Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)), "JPEG")
        for _ in range(5)
    ]
    for i, data in enumerate(files):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    in_files = on_disk(tmp_path, [f"{i}.jpg" for i in range(5)])
    encoded = packed(files)
    decoded = encoded.decoded()
    assert decoded.pixels is not None and decoded.pixels.shape == (5, 8, 12, 3)
    for images in (in_files, encoded, decoded):
        assert len(images) == 5 and images.sizes.tolist() == [[8, 12]] * 5
        for i in range(5):
            np.testing.assert_array_equal(images.read(i), in_files.read(i))


def test_encoded_images_of_several_sizes_stay_encoded(jpeg_files: list[bytes]) -> None:
    assert packed(jpeg_files).decoded().pixels is None
    large = encode(RGB.resize((97, 8)), "JPEG")
    assert packed([large, large]).decoded().pixels is None


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
