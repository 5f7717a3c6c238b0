"""rdm_fast.data.images: what Pillow makes of odd files, and one clear sentence for bad ones."""

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdm_fast.data.images import (
    EncodedImages,
    FileImages,
    ImageSet,
    PixelImages,
    decode,
    image_size,
)
from rdm_fast.errors import DataError


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it has this size and holds nothing."""
    bodies = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"]
    chunks = [
        struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        for body in bodies
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


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
BAD = {
    "empty": (b"", "empty|not an image"),
    "text": (b"not an image at all", "not an image"),
    "half a header": (encode(RGB)[:12], "not an image"),
    "bomb": (png_header(30_000, 30_000), "more than|exceeds"),
    "large, under Pillow's own limit": (png_header(10_000, 10_000), "more than 89478485"),
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_every_mode_becomes_rgb_as_pillow_converts_it(data: bytes) -> None:
    pixels = decode(io.BytesIO(data), "x")
    assert pixels.shape == (6, 9, 3) and pixels.dtype == np.uint8
    assert image_size(io.BytesIO(data)) == (6, 9)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(pixels, expected)


def test_transparency_is_dropped_and_16_bit_grey_cut_off() -> None:
    clear = RGB.copy()
    clear.putalpha(0)
    np.testing.assert_array_equal(decode(io.BytesIO(encode(clear)), "x"), np.asarray(RGB))
    deep = np.array([[0, 7, 255, 256, 65535]], np.uint16)
    cut = decode(io.BytesIO(encode(Image.fromarray(deep))), "x")
    np.testing.assert_array_equal(cut[0, :, 0], [0, 7, 255, 255, 255])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("data", "reason"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_by_name_and_count(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(RGB))
    for name in ("b.png", "c.png"):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"(?s)2 of 3 images.*b\.png \(.*({reason})") as caught:
        FileImages(tmp_path, ["a.png", "b.png", "c.png"], [1, 1, 1], None, [])
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="this one cannot be read"):
        decode(io.BytesIO(data), "this one")


def test_a_truncated_body_is_refused_when_read(tmp_path: Path, jpeg_files: list[bytes]) -> None:
    for name, data in (("t.jpg", jpeg_files[0]), ("t.png", encode(RGB.resize((90, 60))))):
        (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
        images = FileImages(tmp_path, [name], [1], None, [])
        with pytest.raises(DataError, match=rf"{name} cannot be read as an image"):
            images.read(0)


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(RGB))
    images = FileImages(tmp_path, ["a.png"], [1], None, [])
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png .*no such file"):
        images.read(0)


def test_odd_file_names_survive(tmp_path: Path) -> None:
    names = ["ü ñ 图.png", "-rf.png", "new\nline.png", "tab\t.png", "\udcff.png"]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(encode(RGB.resize((2 + i, 3))))
    images = FileImages(tmp_path, names, [0] * len(names), None, [])
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
    on_disk = FileImages(tmp_path, [f"{i}.jpg" for i in range(5)], [0] * 5, None, [])
    encoded = packed(files)
    decoded = encoded.decoded()
    assert decoded.pixels is not None and decoded.pixels.shape == (5, 8, 12, 3)
    for images in (on_disk, encoded, decoded):
        assert len(images) == 5 and images.sizes.tolist() == [[8, 12]] * 5
        for i in range(5):
            np.testing.assert_array_equal(images.read(i), on_disk.read(i))


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
