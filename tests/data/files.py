"""Image files as strangers make them, and ways to read a folder of them."""

import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rdm_fast.config import AugmentConfig, Config, DataConfig, OptimConfig, ViewConfig
from rdm_fast.data import Batch, ImageSet, build_loader, load
from rdm_fast.data.images.sets import EncodedImages, FileImages

Pixels = NDArray[np.uint8]
ADLER = 65521
H, W = 64, 80


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


PICTURE = Image.fromarray(natural(1, H, W, seed=7)[0])
VIEW = ViewConfig(crop_scale=(0.2, 1), jitter=0.8, grey=0.2, blur=0.5, flip=0.5)
AUGMENT = AugmentConfig(size=32, view1=VIEW, view2=replace(VIEW, solarize=0.2))


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


JPEG, PNG = encode(PICTURE, "JPEG", quality=90), encode(PICTURE)


def png(width: int, height: int, depth: int, color: int, data: bytes) -> bytes:
    """A PNG of any header and any compressed data (color 0 is grey, 2 is RGB)."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + data, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def bomb(side: int) -> bytes:
    """A valid PNG of side x side black RGB pixels, a thousandth as large as they are."""
    rest = side * (3 * side + 1)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    piece = 1 << 20
    block = packer.compress(bytes(piece)) + packer.flush(zlib.Z_FULL_FLUSH)
    end = packer.compress(bytes(rest % piece)) + packer.flush()
    checksum = struct.pack(">HH", rest % ADLER, 1)  # Adler-32 of zeros
    return png(side, side, 8, 2, b"\x78\xda" + block * (rest // piece) + end + checksum)


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


DAMAGED = {
    "data.png": patched(PNG, PNG.index(b"IDAT") + len(PNG) // 2, b"\xaa" * 64),
    "checksum.png": patched(PNG, PNG.index(b"IDAT") + 4, b"\xff\xff"),
    "data.jpg": patched(JPEG, JPEG.index(b"\xff\xc4") + 5, b"\xff" * 16),
}
"""Damage in the middle, which only decoding shows."""


def packed(files: list[bytes]) -> EncodedImages:
    data = np.frombuffer(b"".join(files), np.uint8).copy()
    return EncodedImages(data, np.cumsum([0, *map(len, files)]), None, [], "some.npz")


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def good_images(root: Path) -> Path:
    """Four good images in each of the classes a and b: a/0.jpg to b/7.jpg."""
    for i, pixels in enumerate(natural(8, H, W)):
        data = encode(Image.fromarray(pixels), "JPEG", quality=90)
        put(root / "train" / "ab"[i // 4] / f"{i}.jpg", data)
    return root


def read_folder(root: Path, table: Path | None = None, **options: object) -> FileImages:
    """The training images; half of them may be bad, and `table` lists those."""
    config = DataConfig(name="folder", root=str(root), **{"max_bad": 0.5, **options})
    images = load(config, "train", table)
    assert isinstance(images, FileImages)
    return images


def rows(table: Path) -> list[tuple[str, str]]:
    """Paths and reasons in a table of bad files."""
    if not table.exists():
        return []
    header, *lines = table.read_text(encoding="utf-8").splitlines()
    assert header == "path\treason"
    return [(path, reason) for path, reason in (line.split("\t") for line in lines)]


def epoch_of(images: ImageSet, loader: str = "torch", **data: object) -> Batch:
    """The first epoch as one batch."""
    config = Config(
        data=DataConfig(name="folder", loader=loader, **{"workers": 0, "max_bad": 0.5, **data}),
        augment=AUGMENT,
        optim=OptimConfig(global_batch=len(images)),
    )
    made = build_loader(config, images, rank=0, world_size=1, device=torch.device("cpu"))
    (batch,) = made.epoch(0)
    assert batch.view1.isfinite().all() and batch.view2.isfinite().all()
    return batch


def levels(grey: NDArray[np.integer]) -> Pixels:
    """[H, W] as RGB, [H, W, 3]."""
    return np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8)
