"""Odd image files that are used, with stated pixels; docs/data.md has the same table.

Each lies among good images. All loaders and both ways of verifying agree.
"""

import io
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, features

from rdm_fast.data.images.sets import FileImages, PixelImages
from rdm_fast.data.loaders.dali_input import file_for_dali
from tests.data.files import (
    JPEG,
    PICTURE,
    PNG,
    H,
    W,
    encode,
    epoch_of,
    good_images,
    levels,
    natural,
    png,
    put,
    read_folder,
    rows,
)  # fmt: skip
from tests.data.loaders.dali_here import needs_dali

Pixels = NDArray[np.uint8]

PIXELS = np.asarray(PICTURE)
OTHER = Image.fromarray(natural(1, H, W, seed=8)[0])
DEEP = np.random.default_rng(3).integers(0, 65536, (H, W, 3), dtype=np.uint16)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be turned by 90 degrees for display
CLEAR = PICTURE.copy()
CLEAR.putalpha(Image.fromarray(np.tile(np.arange(W, dtype=np.uint8), (H, 1))))
PALETTE = PICTURE.quantize(64)
GREY = Image.fromarray(PIXELS[:, :, 0])


def converted(data: bytes) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


GIF = encode(PALETTE, "GIF", save_all=True, append_images=[OTHER.quantize(64)] * 2)
WEBP = encode(PICTURE, "WEBP", save_all=True, append_images=[OTHER] * 2, lossless=True)
STILL = encode(PICTURE, "WEBP")
APNG = encode(PICTURE, "PNG", save_all=True, append_images=[OTHER] * 2)
RGB16 = png(W, H, 16, 2, zlib.compress(b"".join(b"\0" + row.tobytes() for row in DEEP.byteswap())))
PGM16 = b"P5\n%d %d\n65535\n" % (W, H) + DEEP[:, :, 0].byteswap().tobytes()
LINE = PICTURE.crop((0, 0, W, 1))
THIN = LINE.resize((3000, 1))
CMYK = encode(PICTURE.convert("CMYK"), "JPEG")
GREY_JPEG = encode(GREY, "JPEG")
EXIF = encode(PICTURE, "JPEG", exif=TURNED)
PROGRESSIVE = encode(PICTURE, "JPEG", progressive=True, subsampling=2)
MPO = encode(PICTURE, "MPO", save_all=True, append_images=[OTHER])

USED: dict[str, tuple[bytes, str, Pixels]] = {
    "grey": (encode(GREY), "odd.png", levels(PIXELS[:, :, 0])),
    "grey with alpha": (encode(CLEAR.convert("LA")), "odd.png",
                        levels(np.array(CLEAR.convert("L")))),
    "grey JPEG": (GREY_JPEG, "odd.jpg", converted(GREY_JPEG)),
    "one bit": (encode(GREY.point(lambda v: 255 * (v > 99), "1")), "odd.png",
                levels(255 * (PIXELS[:, :, 0] > 99))),
    "palette": (encode(PALETTE), "odd.png", np.array(PALETTE.convert("RGB"))),
    "palette with transparency": (encode(PALETTE, transparency=0), "odd.png",
                                  np.array(PALETTE.convert("RGB"))),
    "RGBA": (encode(CLEAR), "odd.png", PIXELS),
    "CMYK JPEG": (CMYK, "odd.jpg", converted(CMYK)),
    "16-bit grey PNG": (encode(Image.fromarray(DEEP[:, :, 0])), "odd.png",
                        levels(DEEP[:, :, 0] >> 8)),
    "16-bit grey TIFF": (encode(Image.fromarray(DEEP[:, :, 0]), "TIFF"), "odd.tif",
                         levels(DEEP[:, :, 0] >> 8)),
    "16-bit grey PGM": (PGM16, "odd.pgm", levels(DEEP[:, :, 0] >> 8)),
    "16-bit RGB PNG": (RGB16, "odd.png", (DEEP >> 8).astype(np.uint8)),
    "turned by EXIF": (EXIF, "odd.jpg", converted(EXIF)),
    "animated GIF": (GIF, "odd.gif", np.array(PALETTE.convert("RGB"))),
    "animated WebP": (WEBP, "odd.webp", PIXELS),
    "animated PNG": (APNG, "odd.png", PIXELS),
    "progressive JPEG": (PROGRESSIVE, "odd.jpg", converted(PROGRESSIVE)),
    "PNG with bytes after its end": (PNG + b"\0" * 40, "odd.png", PIXELS),
    "animated PNG with bytes after its end": (APNG + b"\0" * 40, "odd.png", PIXELS),
    "JPEG with bytes after its end": (JPEG + b"\0" * 40, "odd.jpg", converted(JPEG)),
    "JPEG of two pictures": (MPO, "odd.jpg", converted(MPO)),
    "BMP": (encode(PICTURE, "BMP"), "odd.bmp", PIXELS),
    "PNG named .jpg": (PNG, "odd.jpg", PIXELS),
    "suffix in capitals": (PNG, "ODD.PNG", PIXELS),
    "unicode in the name": (PNG, "図 ñ é.png", PIXELS),
    "newline and tab in the name": (PNG, "odd\n\t.png", PIXELS),
    "name that is not UTF-8": (PNG, "odd\udcff.png", PIXELS),
    "name like a flag": (PNG, "-rf.png", PIXELS),
    "in a subfolder called .jpg": (PNG, "sub.jpg/odd.png", PIXELS),
    "one pixel": (encode(PICTURE.crop((0, 0, 1, 1))), "odd.png", PIXELS[:1, :1]),
    "one pixel high": (encode(LINE), "odd.png", PIXELS[:1]),
    "very thin": (encode(THIN), "odd.png", np.array(THIN)),
}  # fmt: skip
for form, feature in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")):
    if features.check(feature):  # of this Pillow
        data = encode(PICTURE, form)
        USED[form] = (data, "odd.avif" if form == "AVIF" else "odd.jp2", converted(data))


@pytest.fixture(scope="module")
def odd_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good images, and each odd one in a subfolder of class b."""
    root = good_images(tmp_path_factory.mktemp("odd"))
    for kind, (data, name, _) in USED.items():
        put(root / "train/b" / kind / name, data)
    return root


@pytest.fixture(scope="module", params=["header", "full"])
def odd(request: pytest.FixtureRequest, odd_root: Path) -> FileImages:
    table = odd_root / "bad_files.tsv"
    images = read_folder(odd_root, table, verify=request.param)
    assert len(images) == 8 + len(USED) and rows(table) == []
    return images


@pytest.mark.parametrize("kind", USED)
def test_odd_images_are_used_with_stated_pixels(kind: str, odd: FileImages, odd_root: Path) -> None:
    _, name, expected = USED[kind]
    path = odd_root / "train/b" / kind / name
    (i,) = [i for i in range(len(odd)) if odd.path(i) == path]
    assert odd.labels is not None and odd.labels[i] == 1
    assert odd.sizes[i].tolist() == list(expected.shape[:2])
    np.testing.assert_array_equal(odd.read(i), expected)
    assert "\n" not in odd.name(i)


@pytest.mark.parametrize("loader", ["resident", pytest.param("dali", marks=needs_dali)])
def test_every_loader_shows_odd_images_alike(loader: str, odd_root: Path) -> None:
    images = read_folder(odd_root)
    if loader == "resident":  # those of one size
        same = [i for i in range(len(images)) if images.sizes[i].tolist() == [H, W]]
        stack = np.stack([images.read(i) for i in same])
        assert len(stack) > 30
        images = PixelImages(stack, None, [])
    expected, found = epoch_of(images, "torch"), epoch_of(images, loader)
    assert torch.equal(found.indices, expected.indices) and torch.equal(
        found.labels, expected.labels
    )
    off = 255 * 0.229 * (found.view1 - expected.view1).abs()
    assert (off > 4).flatten(1).double().mean(1).max() <= 0.02
    assert off.flatten(1).mean(1).max() <= 2.0


@needs_dali
def test_dali_decodes_odd_images_to_the_same_pixels(odd_root: Path) -> None:
    from nvidia.dali import fn, pipeline_def, types

    from rdm_fast.data.loaders.dali_graph import decoded

    images = read_folder(odd_root)
    files = [file_for_dali(images, i) for i in range(len(images))]

    @pipeline_def(batch_size=len(files), num_threads=1, device_id=None)
    def decode_all() -> object:
        return decoded(fn.external_source(lambda: files, dtype=types.UINT8, ndim=1), False)

    (pixels,) = decode_all().run()
    for i in range(len(images)):
        np.testing.assert_array_equal(pixels.at(i), images.read(i))
