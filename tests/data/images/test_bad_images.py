"""Bad image files and files that are ignored; docs/data.md has the same table.

Each lies among good images. Both ways of verifying agree.
"""

import io
import os
import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rdm_fast.config import DataConfig
from rdm_fast.data.images.decode import MAX_PIXELS, ImageSize, decode, inspect_image
from rdm_fast.data.images.folder import load_folder
from rdm_fast.data.images.sets import FileImages
from rdm_fast.errors import DataError
from tests.data.files import (
    DAMAGED,
    JPEG,
    PICTURE,
    PNG,
    bomb,
    encode,
    patched,
    png,
    put,
    read_folder,
    rows,
)  # fmt: skip
from tests.data.images.test_odd_images import APNG, GIF, PALETTE, PGM16, PIXELS, RGB16, STILL, WEBP
from tests.ranks import run_ranks

SOF = JPEG.index(b"\xff\xc0")
LIAR = patched(JPEG, SOF + 5, struct.pack(">HH", 65500, 65500))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
TOO_MANY = f"more than {MAX_PIXELS} pixels"
NO_IMAGE = "not an image, or a damaged header"
UNSUPPORTED = "TIFF of mode {}, which is not supported"

BAD: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "odd.png", "empty"),
    "JPEG cut in the middle": (JPEG[: len(JPEG) // 2], "odd.jpg", "truncated"),
    "JPEG without its last 20 bytes": (JPEG[:-20], "odd.jpg", "truncated"),
    "PNG cut in the middle": (PNG[: len(PNG) // 2], "odd.png", "truncated"),
    "WebP cut in the middle": (WEBP[: len(WEBP) // 2], "odd.webp", "could not create decoder"),
    "still WebP cut in the middle": (STILL[: len(STILL) // 2], "odd.webp", "could not"),
    "GIF cut in the middle": (GIF[:900], "odd.gif", "truncated"),
    "damaged header": (patched(JPEG, 0, bytes(4)), "odd.jpg", NO_IMAGE),
    "not an image": (b"<html>404</html>", "odd.jpg", NO_IMAGE),
    "PostScript named .jpg": (EPS, "odd.jpg", NO_IMAGE),
    "decompression bomb": (bomb(14_000), "odd.png", TOO_MANY),
    "bomb with nothing in it": (png(30_000, 30_000, 8, 0, b""), "odd.png", TOO_MANY),
    "lying header": (LIAR, "odd.jpg", TOO_MANY),
    "float pixels": (encode(Image.fromarray(PIXELS[:, :, 0].astype(np.float32)), "TIFF"), "odd.tif",
                     UNSUPPORTED.format("F")),
    "32-bit pixels": (encode(Image.fromarray(PIXELS[:, :, 0].astype(np.int32)), "TIFF"), "odd.tif",
                      UNSUPPORTED.format("I")),
    "CIELAB": (encode(PICTURE.convert("LAB"), "TIFF"), "odd.tif", UNSUPPORTED.format("LAB")),
    "newline in the name": (b"", "odd\\\n\t\udcff.png", "empty"),
}  # fmt: skip


def assert_good_ones(images: FileImages) -> None:
    """The eight good images, with the labels of their folders."""
    assert [images.path(i).name for i in range(len(images))] == [f"{i}.jpg" for i in range(8)]
    assert images.classes == ["a", "b"]
    assert images.labels is not None and images.labels.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("verify", ["header", "full"])
def test_bad_files_are_left_out_and_listed(verify: str, root: Path, table: Path) -> None:
    folder, expected = root / "train/a", {}
    for kind, (data, name, why) in BAD.items():
        put(folder / kind / name, data)
        expected[f"{folder}/{kind}/{name}"] = why
    for name, target, why in (
        ("dangling.png", "nowhere.png", "no such file or directory"),
        ("itself.png", "itself.png", "too many levels of symbolic links"),
    ):
        (folder / name).symlink_to(target)
        expected[f"{folder / name}"] = why
    os.mkfifo(folder / "pipe.png")
    expected[f"{folder}/pipe.png"] = "not a regular file"
    assert_good_ones(read_folder(root, table, verify=verify, max_bad=0.9))
    found = dict(rows(table))
    escaped = f"{folder}/newline in the name/" + r"odd\\\n\t\udcff.png"
    found[f"{folder}/newline in the name/odd\\\n\t\udcff.png"] = found.pop(escaped)
    assert found.keys() == expected.keys()
    for path, why in expected.items():
        assert why in found[path], path


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Without the superuser's right to read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("verify", ["header", "full"])
def test_a_file_without_read_permission_is_bad(verify: str, root: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # tmp_path is private
        public = Path(name)
        public.chmod(0o777)
        shutil.move(root / "train", public)
        path, table = put(public / "train/a/odd.png", PNG), public / "bad_files.tsv"
        path.chmod(0)
        with as_somebody_else():
            assert_good_ones(read_folder(public, table, verify=verify))
            assert rows(table) == [(str(path), "permission denied")]
        path.chmod(0o644)  # its time of change stays, so nothing may be cached for it
        assert len(read_folder(public, table, verify=verify)) == 9


def test_full_verification_finds_damage_in_the_middle(root: Path, table: Path) -> None:
    for name, data in DAMAGED.items():
        put(root / "train/a" / name, data)
    assert len(read_folder(root, table)) == 8 + len(DAMAGED)
    assert_good_ones(read_folder(root, table, verify="full"))
    assert {Path(path).name for path, _ in rows(table)} == DAMAGED.keys()


# ---- ignored ---------------------------------------------------------------------------------


def test_whatever_is_no_image_of_its_own_is_ignored(root: Path, table: Path) -> None:
    folder = root / "train/a"
    for name in (".odd.png", ".odd/odd.png", "notes.txt", "odd"):
        put(folder / name, PNG)
    (folder / "loop").symlink_to(folder.parent)
    os.link(folder / "0.jpg", folder / "odd.jpg")  # a second name
    (root / "train/aa").mkdir()
    assert_good_ones(read_folder(root, table))
    assert rows(table) == []


def test_a_class_of_bad_files_keeps_its_label(root: Path) -> None:
    put(root / "train/aa/odd.png", b"")
    images = read_folder(root)
    assert images.classes == ["a", "aa", "b"]
    assert images.labels is not None and images.labels.tolist() == [0] * 4 + [2] * 4


# ---- how many are too many -------------------------------------------------------------------


def test_few_bad_files_or_many(root: Path, table: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("odd\n1.png", "odd2.png", "odd3.png"):
        put(root / "train/a" / name, b"")
    assert len(read_folder(root, table, max_bad=0.001)) == 8  # three are few
    put(root / "train/a/odd4.png", b"")
    capfd.readouterr()
    assert len(read_folder(root, table, max_bad=0.34)) == 8  # 4 of 12
    printed = capfd.readouterr().out
    assert printed.count("\n") == 1 and r"odd\n1.png (empty)" in printed and str(table) in printed
    for options in (
        {"max_bad": 0.33},
        {"max_bad": 0.001},
        {"max_bad": 0.0},
        {"on_bad_image": "stop", "max_bad": 1.0},
    ):
        with pytest.raises(DataError) as caught:
            read_folder(root, table, **options)
        assert r"odd\n1.png" in str(caught.value)
        assert len(rows(table)) == 4  # all are listed all the same
    for path in (root / "train/a").glob("odd*"):
        path.unlink()
    put(root / "train/a/odd.png", b"")
    with pytest.raises(DataError, match=r"--data\.max-bad"):
        read_folder(root, table, max_bad=0.0)
    (root / "train/a/odd.png").unlink()
    read_folder(root, table)
    assert not table.exists()


def test_a_folder_of_bad_files_only_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "odd.png", b"")
    with pytest.raises(DataError, match="1 of 1 images"):
        load_folder(tmp_path, "train", DataConfig(name="folder", max_bad=1.0))


# ---- memory, and files that nobody thought of ------------------------------------------------


def peak_growth(good: Path, bombs: Path) -> tuple[int, int]:
    """Number of images among the bombs, and KiB that refusing those took."""
    import resource

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    read_folder(good, verify="full")
    before = peak()
    return len(read_folder(bombs, verify="full")), peak() - before


def test_refusing_bombs_takes_little_memory(root: Path, tmp_path: Path) -> None:
    put(tmp_path / "bombs/train/bomb.png", bomb(14_000))
    put(tmp_path / "bombs/train/hollow.png", png(30_000, 30_000, 8, 0, b""))
    for i in range(8):
        put(tmp_path / f"bombs/train/{i}.jpg", JPEG)
    ((n, kib),) = run_ranks(1, peak_growth, root, tmp_path / "bombs", tmp_path=tmp_path)
    assert n == 8 and kib < 100 * 1024


BASES = [JPEG, PNG, GIF, WEBP, APNG, RGB16, encode(PALETTE, "TIFF"), encode(PICTURE, "BMP"), PGM16]


@settings(max_examples=150)
@given(
    st.sampled_from(BASES), st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1)), max_size=4)
)
def test_no_damage_crashes_an_inspection(base: bytes, damage: list[tuple[float, bytes]]) -> None:
    data = base
    for where, new in damage:
        data = patched(data, int(where * len(data)), new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header, whole = (inspect_image(io.BytesIO(data), full=full) for full in (False, True))
        if isinstance(whole, ImageSize):
            assert header == whole
            assert decode(io.BytesIO(data), "x").shape == (*whole, 3)
        else:
            with pytest.raises(DataError) as caught:
                decode(io.BytesIO(data), "x")
            assert "\n" not in str(caught.value) and whole in str(caught.value)
