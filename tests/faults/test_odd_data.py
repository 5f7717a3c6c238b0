"""Images of odd names, folders, formats and labels train; whatever is left aside is counted."""

import codecs
import errno
import logging
import multiprocessing
import os
import shutil
import tempfile
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from rdm_fast.config import AugmentConfig, Config, DataConfig
from rdm_fast.data import build_loader, load
from rdm_fast.data.images.decode import SUFFIXES
from rdm_fast.data.images.sets import FileImages, ImageSet
from rdm_fast.data.images.shards import ShardImages
from rdm_fast.errors import ConfigMismatch, DataError, InputMissing, UserError
from tests.data.files import PICTURE, H, W, encode, epoch_of, natural, png, put, rows
from tests.data.images.test_arrays import write
from tests.data.images.test_bad_images import as_somebody_else
from tests.data.images.test_shards import pack
from tests.runs import metrics, run, run_to
from tests.tiny import tiny

CPU = torch.device("cpu")
PNGS = [encode(Image.fromarray(pixels)) for pixels in natural(12, 16, 18)]
LEFT = "not used in "


def folder(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        put(root / name, PNGS[i % len(PNGS)])
    return root


def read(root: Path, split: Any = "train", table: Path | None = None, **data: Any) -> ImageSet:
    name = data.pop("name", "folder")
    return load(DataConfig(name=name, root=str(root), **data), split, table)


def names(images: ImageSet) -> list[str]:
    assert isinstance(images, FileImages | ShardImages)
    return [images.indexed_path(i) for i in range(len(images))]


def labels(images: ImageSet) -> list[str | None]:
    """The class of each image by name."""
    assert images.labels is not None
    return [images.classes[k] if k >= 0 else None for k in images.labels.tolist()]


def config_of(root: Path, **data: Any) -> Config:
    """A run of two steps."""
    settings = {"name": "folder", "loader": "torch", "workers": 0} | data
    small = tiny("digits_simsiam", global_batch=4, epochs=1)
    data_config = DataConfig(root=str(root), **settings)
    return replace(small, data=data_config, augment=AugmentConfig(size=8))


# ---- folders ---------------------------------------------------------------------------------


def test_a_folder_of_classes_is_a_training_set(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = ["dog/1.png", "cat/2.png", "cat/deep/3.png", "cat/4.png"]
    root = folder(tmp_path / "data", *files, "val/cat/5.png", "test/dog/6.png")
    train = read(root)
    assert train.classes == ["cat", "dog"] and labels(train) == ["cat"] * 3 + ["dog"]
    assert "has no folder train" in capfd.readouterr().out
    assert labels(read(root, "test")) == ["cat"] and read(root, "test").classes == ["cat", "dog"]
    (tmp_path / "list").write_text("dog\n")
    assert read(root, classes=str(tmp_path / "list")).classes == ["dog"]
    run(tmp_path / "run", config_of(root))
    assert any("loss" in line for line in metrics(tmp_path / "run"))


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Val"), ("training", "validation"), ("TRAIN", "Test")]
)
def test_splits_have_other_names(train: str, test: str, tmp_path: Path) -> None:
    root = folder(tmp_path, f"{train}/a/1.png", f"{train}/b/2.png", f"{test}/b/3.png")
    assert labels(read(root)) == ["a", "b"] and labels(read(root, "test")) == ["b"]


def test_a_folder_above_the_data_is_named(tmp_path: Path) -> None:
    folder(tmp_path, "ILSVRC/Data/train/n01/1.png", "ILSVRC/Data/val/n01/2.png")
    with pytest.raises(InputMissing, match=f"--data.root {tmp_path}/ILSVRC/Data"):
        read(tmp_path)


LITTER = [
    "@eaDir/1.png/thumb.jpg", ".DS_Store", "Thumbs.db", "__MACOSX/cat/1.png", "._1.png",
    ".ipynb_checkpoints/1-checkpoint.png", "lost+found/1.png", "#recycle/1.png", "desktop.ini",
    "$RECYCLE.BIN/1.png", "System Volume Information/1.png", "@Recycle/1.png", ".Trash-0/1.png",
]  # fmt: skip


@pytest.mark.parametrize("where", ["train", "train/cat", "train/cat/deep", ""])
def test_litter_is_ignored_and_counted(
    where: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "data", "train/cat/1.png", "train/dog/2.png", "val/cat/1.png")
    folder(root / where, *LITTER)
    train = read(root, table=tmp_path / "bad.tsv")
    assert names(train) == ["cat/1.png", "dog/2.png"] and train.classes == ["cat", "dog"]
    assert rows(tmp_path / "bad.tsv") == []
    out = capfd.readouterr().out
    assert out.count(LEFT) == bool(where)
    for kind in ("@eaDir", ".DS_Store", "Thumbs.db", "__MACOSX", "._*", "lost+found"):
        assert f"1 {kind} (" in out or not where
    assert "warning" not in out


def test_images_in_formats_that_are_not_read_are_counted_and_listed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "data", "train/cat/1.png", "train/dog/2.png")
    for i in range(36):
        put(root / f"train/cat/{i}.HEIC", b"ftypheic")
    for name in ("x.txt", "x", "x.CR2"):
        put(root / "train/dog" / name, b"x")
    assert len(read(root, table=tmp_path / "bad.tsv")) == 2
    out = capfd.readouterr().out
    assert out.count("warning: ") == 1
    assert all(f"{kind} (" in out for kind in ("36 .heic", "1 .cr2", "1 .txt", "without a suffix"))
    assert len(rows(tmp_path / "bad.tsv")) == 37
    shutil.rmtree(root / "train/dog"), (root / "train/cat/1.png").unlink()
    with pytest.raises(DataError, match=r"36 \.heic"):
        read(root)


SAVED = {
    ".jfif": ("JPEG", {}), ".jpe": ("JPEG", {}), ".JPEG": ("JPEG", {}), ".Webp": ("WEBP", {}),
    ".jp2": ("JPEG2000", {}), ".j2k": ("JPEG2000", {}), ".avif": ("AVIF", {"quality": 100}),
    ".pnm": ("PPM", {}), ".apng": ("PNG", {}), ".mpo": ("MPO", {}), ".TIF": ("TIFF", {}),
}  # fmt: skip


@pytest.mark.parametrize("suffix", SAVED)
@pytest.mark.parametrize("named", ["as it is", ".jpg"])
def test_formats_that_pillow_reads_are_used(suffix: str, named: str, tmp_path: Path) -> None:
    form, options = SAVED[suffix]
    if not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000"}.get(form, "zlib")):
        pytest.skip(f"this Pillow has no {form}")
    data = encode(PICTURE, form, **options)
    put(tmp_path / f"1{suffix if named == 'as it is' else named}", data)
    put(tmp_path / "2.png", data[: len(data) // 2])  # bad
    put(tmp_path / "3.png", data)
    table = tmp_path / "bad.tsv"
    images = read(tmp_path, table=table)
    assert len(images) == 2 and [Path(path).name for path, _ in rows(table)] == ["2.png"]
    assert np.abs(images.read(0).astype(int) - np.asarray(PICTURE)).mean() < 8
    assert epoch_of(images).view1.isfinite().all()


def test_no_dangerous_format_is_among_the_suffixes() -> None:
    assert not {".eps", ".ps", ".pdf", ".psd", ".wmf", ".h5", ".svg"} & {*SUFFIXES}
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"} < {*SUFFIXES}


def tiff_of(bands: int) -> bytes:
    """A TIFF of 8 x 8 pixels with this many bands of 8 bits, which Pillow cannot write."""
    entries = [
        (256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, 1, 8), (277, 3, 1, bands), (278, 3, 1, 8), (279, 4, 1, 64 * bands),
    ]  # fmt: skip
    pixels = bytes(64 * bands)
    directory = len(entries).to_bytes(2, "little") + b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little")
        + value.to_bytes(4, "little") for tag, kind, count, value in entries
    )  # fmt: skip
    return b"II*\0" + (8 + len(pixels)).to_bytes(4, "little") + pixels + directory + bytes(4)


@pytest.mark.parametrize("bands", [5, 13])
def test_a_tiff_of_many_bands_is_said_to_have_them(
    bands: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path, "train/a/1.png")
    put(tmp_path / "train/a/2.tif", tiff_of(bands))
    read(tmp_path, table=tmp_path / "bad.tsv")
    ((_, reason),) = rows(tmp_path / "bad.tsv")
    assert f"{bands} bands" in reason
    assert capfd.readouterr().out.count("\n") == 1
    assert logging.getLogger("PIL").handlers  # else Pillow's message goes to stderr


def test_a_folder_that_cannot_be_listed_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path, "train/a/1.png", "train/b/1.png")
    scandir = os.scandir

    def broken(path: Any) -> Any:
        if os.path.basename(path) == "b":
            raise OSError(errno.EIO, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(DataError, match=r"train/b .*input/output error"):
        read(tmp_path)


# ---- files that change in place --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_files_that_change_in_place_are_noticed_once_with_their_number(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Names and sizes are kept. It is noticed in the epoch, and again at the next start."""
    first, second = (
        [encode(Image.fromarray(pixels), "BMP") for pixels in natural(8, H, W, seed)]
        for seed in (0, 1)
    )

    def write(files: list[bytes]) -> None:
        if kind == "shards":
            pack(tmp_path / "a.tar", {f"{i}.bmp": data for i, data in enumerate(files)})
        for i, data in enumerate(files):
            put(tmp_path / f"train/{i}.bmp", data) if kind == "files" else None

    write(first)
    name = "webdataset" if kind == "shards" else "folder"
    images = read(tmp_path, name=name)
    epoch_of(images), read(tmp_path, name=name)
    assert "warning" not in capfd.readouterr().out
    write(second)
    epoch_of(images)
    out = capfd.readouterr().out
    assert out.count("warning") == 1 and "8 of 8 images" in out and ".bmp" in out
    read(tmp_path, name=name)
    out = capfd.readouterr().out
    assert out.count("warning") == 1 and "8 of 8 files" in out
    read(tmp_path, name=name)
    assert "warning" not in capfd.readouterr().out


# ---- what may not be read --------------------------------------------------------------------


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder that everybody may enter and write to, unlike pytest's."""
    codecs.lookup("ascii")  # while Python's own files may be read
    path = Path(tempfile.mkdtemp(prefix="shared-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("kept", "mode", "found"),
    [
        ("data/train/b", 0o000, "train/b"),
        ("data/train/b", 0o444, 12),  # it can be listed, and nothing in it opened
        ("data/train/b/1.png", 0o000, 15),
        ("data/train", 0o000, "train"),
        ("data", 0o000, "data"),
        ("packed.npz", 0o000, "packed.npz"),
        ("data/train/.rdm_fast_index.npz", 0o000, 16),
    ],
)
def test_what_may_not_be_read_is_left_out_or_one_error(
    kept: str, mode: int, found: int | str, shared: Path
) -> None:
    root = folder(shared / "data", *(f"train/{c}/{i}.png" for c in "abcd" for i in range(4)))
    write(shared / "packed.npz", {"train_images": natural(4, 8, 8), "train_label": np.arange(4)})
    put(root / "train/.rdm_fast_index.npz", b"")
    data: dict[str, Any] = {"max_bad": 0.5}
    if kept == "packed.npz":
        root, data = shared / kept, {"name": "arrays"}
    (shared / kept).chmod(mode)
    table = shared / "bad.tsv"
    try:
        with as_somebody_else():
            if isinstance(found, int):
                assert len(read(root, table=table, **data)) == found
            else:
                with pytest.raises(UserError) as refused:
                    read(root, table=table, **data)
    finally:
        (shared / kept).chmod(0o777)
    if isinstance(found, int):
        assert {reason for _, reason in rows(table)} <= {"permission denied"}
        assert len(rows(table)) == 16 - found
    else:
        assert refused.value.code in (65, 66) and found in str(refused.value)
        assert "permission denied" in str(refused.value).lower()


# ---- names -----------------------------------------------------------------------------------


def nfd(name: str) -> str:
    return unicodedata.normalize("NFD", name)


def test_classes_are_the_same_in_either_form_of_unicode(tmp_path: Path) -> None:
    cafe, pinata = "café", "piñata"
    root = folder(
        tmp_path / "data", f"train/{nfd(cafe)}/1.png", f"train/{pinata}/2.png",
        f"val/{cafe}/3.png", f"val/{nfd(pinata)}/4.png",
    )  # fmt: skip
    train, test = read(root), read(root, "test")
    assert train.classes == test.classes == [cafe, pinata]
    assert labels(train) == labels(test) == [cafe, pinata]
    folder(root, f"train/{cafe}/5.png")  # both at once are one class
    assert read(root).classes == [cafe, pinata] and len(read(root)) == 3
    (tmp_path / "list").write_text(f"\ufeff{nfd(pinata)}\r\n", encoding="utf-8")
    chosen = read(root, classes=str(tmp_path / "list"))
    assert chosen.classes == [pinata] and len(chosen) == 1


def test_a_class_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder(tmp_path / "data", "train/cat/1.png", "train/big dog/2.png", "train/x/3.png")
    (tmp_path / "list").write_bytes(b"\xef\xbb\xbfcat\r\n# no\r\n  big dog \r\n\r\n")
    assert read(tmp_path / "data", classes=str(tmp_path / "list")).classes == ["big dog", "cat"]


ODD_NAMES = [
    "a b.png", "a.b.c.PNG", "IMG_2020.01.00.jpg", " x.Jpg", "x .png", "x..png", "new\nline.png",
    "tab\t.png", "quote'\".png", "-rf.png", "*.png", "图.jpeg", "e\u0301.png", "%s{}.png", "\\.png",
    "trailing.png.png", "\udcff.png", "con.png", "~.png", "$HOME.png",
]  # fmt: skip


def test_odd_names_of_files_and_classes_are_taken(tmp_path: Path) -> None:
    files = [f"train/{c}/{name}" for c in ("a.b c", "new\nline") for name in ODD_NAMES]
    root = folder(tmp_path / "data", *files, *(f"val/a.b c/{name}" for name in ODD_NAMES))
    train, test = read(root), read(root, "test")
    assert sorted(names(train)) == sorted(file.removeprefix("train/") for file in files)
    assert train.classes == test.classes == ["a.b c", "new\nline"]
    assert epoch_of(train).view1.shape[0] == len(files)
    again = read(root)
    assert again.digest == train.digest and names(again) == names(train)


# ---- 16 bits ---------------------------------------------------------------------------------

DEEP = np.random.default_rng(5).integers(0, 4096, (H, W), dtype=np.uint16)
DEEP[0, 0] = 4095


@pytest.mark.parametrize("name", ["folder", "webdataset", "arrays"])
def test_images_of_12_bits_are_warned_of_and_scaled(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = encode(Image.fromarray(DEEP))
    root = tmp_path / "data"
    if name == "folder":
        put(root / "1.png", data)
    elif name == "webdataset":
        pack(root / "0.tar", {"1.png": data})
    else:
        jpeg = np.frombuffer(data, np.uint8)
        root = write(
            tmp_path / "x.npz", {"train_jpeg": jpeg, "train_offset": np.array([0, len(data)])}
        )
    dark = read(root, name=name)
    out = capfd.readouterr().out
    assert out.count("warning: ") == 1 and "4095" in out and "--data.white-level 4095" in out
    assert (dark.read(0) == (DEEP >> 8)[..., None]).all() and dark.read(0).max() == 15
    scaled = read(root, name=name, white_level=4095)
    assert capfd.readouterr().out == ""
    expected = np.rint(DEEP / 4095 * 255)[..., None]
    assert (scaled.read(0) == expected).all() and scaled.read(0).max() == 255
    assert scaled.digest != dark.digest
    assert read(root, name=name, white_level=1000).read(0).max() == 255  # clipped
    assert "warning: " in capfd.readouterr().out


@pytest.mark.parametrize(("shift", "warned"), [(0, 1), (4, 0)])
def test_color_of_12_bits_in_16_is_warned_of(
    shift: int, warned: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pixels = np.repeat((DEEP << shift).astype(">u2")[:, :, None], 3, axis=2)
    scanlines = b"".join(b"\0" + row.tobytes() for row in pixels)
    put(tmp_path / "1.png", png(W, H, 16, 2, zlib.compress(scanlines)))
    read(tmp_path)
    out = capfd.readouterr().out
    assert out.count("warning: ") == warned and ("4095" in out) == bool(warned)


def test_images_that_use_their_16_bits_are_not_warned_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "1.png", encode(Image.fromarray(DEEP * 16)))
    put(tmp_path / "2.png", PNGS[0])
    assert len(read(tmp_path)) == 2 and capfd.readouterr().out == ""


def test_another_white_does_not_resume(tmp_path: Path) -> None:
    for i in range(8):
        put(tmp_path / f"data/{i}.png", encode(Image.fromarray(np.roll(DEEP, i))))
    run_to(tmp_path / "run", config_of(tmp_path / "data"), 1)
    with pytest.raises(ConfigMismatch):
        run(tmp_path / "run", config_of(tmp_path / "data", white_level=4095))


# ---- shards ----------------------------------------------------------------------------------


def shards(root: Path, members: dict[str, bytes], split: str = "train") -> Path:
    pack(root / split / "000.tar", members)
    return root


def test_members_with_several_points_are_images(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    members: dict[str, bytes] = {}
    for i in range(12):
        members[f"d.1/IMG_2020.{i:02}.00.{'JPG' if i % 2 else 'png'}"] = PNGS[i]
        members[f"d.1/IMG_2020.{i:02}.00.cls"] = str(i % 3).encode()
    root = shards(tmp_path / "data", {**members, "d.1/.hidden.png": PNGS[0], "x.json": b"{}"})
    for _ in range(2):  # listed, recalled
        images = read(root, name="webdataset")
        assert len(images) == 12 and labels(images) == [str(i % 3) for i in range(12)]
        assert "1 hidden" in capfd.readouterr().out


def test_a_key_up_to_the_first_point_labels_all_its_images(tmp_path: Path) -> None:
    root = shards(tmp_path, {"x.left.jpg": PNGS[0], "x.right.jpg": PNGS[1], "x.cls": b"1"})
    assert labels(read(root, name="webdataset")) == ["1", "1"]


def test_members_that_are_left_out_are_counted_and_listed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    members = {"x.jpg": PNGS[0], "x.seg.png": PNGS[1], "y.png": PNGS[2], "y.depth.png": PNGS[3]}
    members |= {"z.heic": b"heic", "__MACOSX/._x.jpg": b"fork", "./@eaDir/x.jpg": PNGS[4]}
    members |= {"./v.png": PNGS[5], "x.txt": b"caption"}
    root = shards(tmp_path / "data", members)
    for _ in range(2):
        images = read(root, table=tmp_path / "bad.tsv", name="webdataset")
        assert names(images) == ["000.tar/x.jpg", "000.tar/y.png", "000.tar/./v.png"]
        out = capfd.readouterr().out
        assert out.count("warning: ") == 1 and "2 further images" in out and "2 hidden" in out
        listed = {path.rpartition("/")[2] for path, _ in rows(tmp_path / "bad.tsv")}
        assert listed == {"x.seg.png", "y.depth.png", "z.heic"}


GIVEN: dict[str, tuple[bytes, str | None]] = {
    "number": (b"3", "3"), "with a newline": (b" 3\n", "3"), "whole float": (b"2.0", "2"),
    "number as text": (b'"7"', "7"), "none yet": (b"-1", None), "null": (b"null", None),
    "empty": (b"", None), "float": (b"1.5", None), "list": (b"[1]", None), "true": (b"true", None),
    "negative": (b"-2", None), "huge": (b"99999999", None), "digits": (b"9" * 9999, None),
    "bytes": (b"\xff\xfe\xfd", None), "object": (b'{"a": 1}', None), "NaN": (b"NaN", None),
    "infinite": (b"1e999", None), "deep": (b"[" * 99999, None), "caption": (b"a " * 200, None),
}  # fmt: skip
NULLS = {"null", "none yet"}


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_a_bad_label_costs_the_label_alone(
    kind: str, suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, expected = GIVEN[kind]
    if suffix == "json":
        text = b'{"caption": "x", "label": ' + text + b"}"
    members = {"a.jpg": PNGS[0], "a.cls": b"0", "b.jpg": PNGS[1], f"b.{suffix}": text}
    root = shards(tmp_path / "data", members)
    bad = expected is None and kind not in NULLS
    for _ in range(2):
        images = read(root, table=tmp_path / "bad.tsv", name="webdataset")
        assert labels(images) == ["0", expected]
        assert capfd.readouterr().out.count("1 labels") == bad
        assert len(rows(tmp_path / "bad.tsv")) == bad


def test_labels_that_are_names_are_classes(tmp_path: Path) -> None:
    cafe = "café"
    train = {
        "a.jpg": PNGS[0], "a.cls": b"dog\n", "b.jpg": PNGS[1], "b.json": b'{"label": "big cat"}',
        "c.jpg": PNGS[2], "c.cls": b'"dog"', "d.jpg": PNGS[3], "d.cls": nfd(cafe).encode(),
        "e.jpg": PNGS[4], "e.json": b'{"cls": "dog", "label": null}', "f.jpg": PNGS[5],
        "g.jpg": PNGS[6], "g.cls": b"7",
    }  # fmt: skip
    root = shards(tmp_path / "data", train)
    shards(
        root, {"a.jpg": PNGS[0], "a.cls": cafe.encode(), "b.jpg": PNGS[1], "b.cls": b"dog"}, "val"
    )
    for _ in range(2):
        images, test = read(root, name="webdataset"), read(root, "test", name="webdataset")
        assert labels(images) == ["dog", "big cat", "dog", cafe, "dog", None, "7"]
        assert images.classes == test.classes == ["7", "big cat", cafe, "dog"]
        assert labels(test) == [cafe, "dog"]
    shards(root, {"a.jpg": PNGS[0], "a.cls": b"zebra"}, "val")
    with pytest.raises(DataError, match="zebra"):
        read(root, "test", name="webdataset")
    run(tmp_path / "run", config_of(root, name="webdataset"))
    assert any("loss" in line for line in metrics(tmp_path / "run"))


# ---- packed arrays ---------------------------------------------------------------------------


def test_packed_arrays_need_no_labels(tmp_path: Path) -> None:
    pixels = natural(8, 12, 12)
    file = write(tmp_path / "x.npz", {"train_images": pixels})
    images = read(file, name="arrays")
    assert images.labels is None and images.classes == [] and len(images) == 8
    run(tmp_path / "run", config_of(file, name="arrays", loader="auto"))
    assert any("loss" in line for line in metrics(tmp_path / "run"))


# ---- how workers start -----------------------------------------------------------------------


def batches(images: ImageSet, workers: int) -> list[torch.Tensor]:
    config = config_of(Path("x"), workers=workers)
    loader = build_loader(config, images, rank=0, world_size=1, device=CPU)
    return [view for batch in loader.epoch(0) for view in batch.views]


@pytest.mark.parametrize(
    "method",
    ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("forkserver", "spawn"))],
)
def test_workers_start_in_every_way(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "data", *(f"train/{'ab'[i % 2]}/{i}.png" for i in range(8)))
    images, started = read(root), []
    get_context = multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: method)
    monkeypatch.setattr(
        multiprocessing, "get_context", lambda m=None: started.append(m) or get_context(m)
    )
    expected = batches(images, workers=0)
    assert all(map(torch.equal, batches(images, workers=1), expected))
    assert method in started
