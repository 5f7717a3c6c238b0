"""Odd and bad image files, one by one: folder, index, pixels, training batch; docs/data.md's table.

Each lies among good images, and ends in one of three ways: used, with stated pixels; bad, with a
stated reason; or ignored. Whichever it is, loaders and looks agree.
"""

import io
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from rdm_fast.config import AugmentConfig, Config, DataConfig, OptimConfig, ViewConfig
from rdm_fast.data import Batch, ImageSet, build_loader, load
from rdm_fast.data.images.decode import MAX_PIXELS, Header, decode, look
from rdm_fast.data.images.folder import load_folder
from rdm_fast.data.images.sets import FileImages, PixelImages, Subset
from rdm_fast.errors import DataError
from rdm_fast.evaluation.features import embed
from rdm_fast.run.folder import RunFolder
from rdm_fast.runtime.distributed import rank
from rdm_fast.training.trainer import Trainer
from tests.data.conftest import natural
from tests.data.files import bomb, encode, png
from tests.data.loaders.dali_here import DECODING, HERE, needs_dali
from tests.ranks import run_ranks
from tests.tiny import tiny

Pixels = NDArray[np.uint8]
Make = Callable[[Path], Path]
"""Puts the odd file under a class folder and returns its path."""

H, W = 64, 80
PICTURE = Image.fromarray(natural(1, H, W, seed=7)[0])
PIXELS = np.asarray(PICTURE)
OTHER = Image.fromarray(natural(1, H, W, seed=8)[0])
DEEP = np.random.default_rng(3).integers(0, 65536, (H, W, 3), dtype=np.uint16)
JPEG = encode(PICTURE, "JPEG", quality=90)
PNG = encode(PICTURE)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be turned by 90 degrees for display
CLEAR = PICTURE.copy()
CLEAR.putalpha(Image.fromarray(np.tile(np.arange(W, dtype=np.uint8), (H, 1))))
PALETTE = PICTURE.quantize(64)
SHORT = Image.fromarray(PIXELS[:, :, 0])


def file(data: bytes, name: str) -> Make:
    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    return make


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def converted(data: bytes) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def levels(grey: NDArray[np.integer]) -> Pixels:
    return np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8)


# ---- used ------------------------------------------------------------------------------------

GIF = encode(PALETTE, "GIF", save_all=True, append_images=[OTHER.quantize(64)] * 2)
WEBP = encode(PICTURE, "WEBP", save_all=True, append_images=[OTHER] * 2, lossless=True)
STILL = encode(PICTURE, "WEBP")
APNG = encode(PICTURE, "PNG", save_all=True, append_images=[OTHER] * 2)
RGB16 = png(W, H, 16, 2, zlib.compress(b"".join(b"\0" + row.tobytes() for row in DEEP.byteswap())))
PGM16 = b"P5\n%d %d\n65535\n" % (W, H) + DEEP[:, :, 0].byteswap().tobytes()
LINE = PICTURE.crop((0, 0, W, 1))

USED: dict[str, tuple[bytes, str, Pixels]] = {
    "grey": (encode(SHORT), "odd.png", levels(PIXELS[:, :, 0])),
    "grey with alpha": (encode(CLEAR.convert("LA")), "odd.png",
                        levels(np.array(CLEAR.convert("L")))),
    "one bit": (encode(SHORT.point(lambda v: 255 * (v > 99), "1")), "odd.png",
                levels(255 * (PIXELS[:, :, 0] > 99))),
    "palette": (encode(PALETTE), "odd.png", np.array(PALETTE.convert("RGB"))),
    "palette with transparency": (encode(PALETTE, transparency=0), "odd.png",
                                  np.array(PALETTE.convert("RGB"))),
    "RGBA": (encode(CLEAR), "odd.png", PIXELS),
    "CMYK JPEG": (c := encode(PICTURE.convert("CMYK"), "JPEG"), "odd.jpg", converted(c)),
    "16-bit grey PNG": (encode(Image.fromarray(DEEP[:, :, 0])), "odd.png",
                        levels(DEEP[:, :, 0] >> 8)),
    "16-bit grey TIFF": (encode(Image.fromarray(DEEP[:, :, 0]), "TIFF"), "odd.tif",
                         levels(DEEP[:, :, 0] >> 8)),
    "16-bit grey PGM": (PGM16, "odd.pgm", levels(DEEP[:, :, 0] >> 8)),
    "16-bit RGB PNG": (RGB16, "odd.png", (DEEP >> 8).astype(np.uint8)),
    "turned by EXIF": (e := encode(PICTURE, "JPEG", exif=TURNED), "odd.jpg", converted(e)),
    "animated GIF": (GIF, "odd.gif", np.array(PALETTE.convert("RGB"))),
    "animated WebP": (WEBP, "odd.webp", PIXELS),
    "animated PNG": (APNG, "odd.png", PIXELS),
    "progressive JPEG": (p := encode(PICTURE, "JPEG", progressive=True), "odd.jpg", converted(p)),
    "PNG with bytes after its end": (PNG + b"\0" * 40, "odd.png", PIXELS),
    "animated PNG with bytes after its end": (APNG + b"\0" * 40, "odd.png", PIXELS),
    "JPEG with bytes after its end": (JPEG + b"\0" * 40, "odd.jpg", converted(JPEG)),
    "JPEG of two pictures": (m := encode(PICTURE, "MPO", save_all=True, append_images=[OTHER]),
                             "odd.jpg", converted(m)),
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
    "very thin": (encode(LINE.resize((3000, 1))), "odd.png", np.array(LINE.resize((3000, 1)))),
}  # fmt: skip

# ---- bad -------------------------------------------------------------------------------------

IDAT = PNG.index(b"IDAT")
SOF = JPEG.index(b"\xff\xc0")
LIAR = patched(JPEG, SOF + 5, struct.pack(">HH", 65500, 65500))
LAB = encode(PICTURE.convert("LAB"), "TIFF")
FLOAT = encode(Image.fromarray(PIXELS[:, :, 0].astype(np.float32)), "TIFF")
DEEPER = encode(Image.fromarray(PIXELS[:, :, 0].astype(np.int32)), "TIFF")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
TOO_MANY = f"more than {MAX_PIXELS} pixels"
NO_IMAGE = "not an image, or a damaged header"


def link(target: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / "odd.png").symlink_to(target)
        return folder / "odd.png"

    return make


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "odd.png")
    return folder / "odd.png"


BAD: dict[str, tuple[Make, str]] = {
    "empty": (file(b"", "odd.png"), "empty"),
    "JPEG cut in the middle": (file(JPEG[: len(JPEG) // 2], "odd.jpg"), "truncated"),
    "JPEG without its last 20 bytes": (file(JPEG[:-20], "odd.jpg"), "truncated"),
    "PNG cut in the middle": (file(PNG[: len(PNG) // 2], "odd.png"), "truncated"),
    "WebP cut in the middle": (
        file(WEBP[: len(WEBP) // 2], "odd.webp"),
        "could not create decoder",
    ),
    "still WebP cut in the middle": (file(STILL[: len(STILL) // 2], "odd.webp"), "could not"),
    "GIF cut in the middle": (file(GIF[:900], "odd.gif"), "truncated|not an image"),
    "damaged header": (file(patched(JPEG, 0, bytes(4)), "odd.jpg"), NO_IMAGE),
    "not an image": (file(b"<html>404</html>", "odd.jpg"), NO_IMAGE),
    "PostScript named .jpg": (file(EPS, "odd.jpg"), NO_IMAGE),
    "decompression bomb": (file(bomb(14_000), "odd.png"), TOO_MANY),
    "bomb with nothing in it": (file(png(30_000, 30_000, 8, 0, b""), "odd.png"), TOO_MANY),
    "lying header": (file(LIAR, "odd.jpg"), TOO_MANY),
    "float pixels": (file(FLOAT, "odd.tif"), "TIFF of mode F, which is not supported"),
    "32-bit pixels": (file(DEEPER, "odd.tif"), "TIFF of mode I, which is not supported"),
    "CIELAB": (file(LAB, "odd.tif"), "TIFF of mode LAB, which is not supported"),
    "dangling link": (link("nowhere.png"), "no such file or directory"),
    "link to itself": (link("odd.png"), "too many levels of symbolic links"),
    "named pipe": (pipe, "not a regular file"),
}
DAMAGED = {
    "damaged PNG data": (patched(PNG, IDAT + len(PNG) // 2, b"\xaa" * 64), "odd.png"),
    "damaged PNG checksum": (patched(PNG, IDAT + 4, b"\xff\xff"), "odd.png"),
    "damaged JPEG data": (patched(JPEG, JPEG.index(b"\xff\xc4") + 5, b"\xff" * 16), "odd.jpg"),
}  # fmt: skip

# ---- ignored ---------------------------------------------------------------------------------


def loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder.parent)
    return folder / "loop"


def second_name(folder: Path) -> Path:
    os.link(folder / "0.jpg", folder / "odd.jpg")
    return folder / "odd.jpg"


def empty_class(folder: Path) -> Path:
    (folder.parent / "aa").mkdir()
    return folder.parent / "aa"


IGNORED: dict[str, Make] = {
    "hidden file": file(PNG, ".odd.png"),
    "file in a hidden folder": file(PNG, ".odd/odd.png"),
    "other suffix": file(b"notes", "odd.txt"),
    "no suffix": file(PNG, "odd"),
    "loop of links": loop,
    "second name of a file": second_name,
    "empty class folder": empty_class,
}


# ---- the way through -------------------------------------------------------------------------

VIEW = ViewConfig(crop_scale=(0.2, 1), jitter=0.8, grey=0.2, blur=0.5, flip=0.5)
AUGMENT = AugmentConfig(size=32, view1=VIEW, view2=replace(VIEW, solarize=0.2))
GOOD = 4  # in each of two classes
TIMEOUT = 300.0  # seconds, of ranks on a busy machine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four good images in each of the classes a and b."""
    for i, pixels in enumerate(natural(2 * GOOD, H, W)):
        path = tmp_path / "data/train" / "ab"[i // GOOD] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
    return tmp_path / "data"


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Without the right to read everything that the superuser has."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def read_in(root: Path, tmp_path: Path, verify: str = "header", **options: object) -> FileImages:
    config = DataConfig(
        name="folder", root=str(root), verify=verify, **{"max_bad": 0.5, **options}  # type: ignore[arg-type]
    )  # fmt: skip
    images = load(config, "train", tmp_path / "bad_files.tsv")
    assert isinstance(images, FileImages)
    return images


def rows(tmp_path: Path) -> list[list[str]]:
    table = tmp_path / "bad_files.tsv"
    if not table.exists():
        return []
    header, *lines = table.read_text(encoding="utf-8").splitlines()
    assert header == "path\treason"
    return [line.split("\t") for line in lines]


def epoch_of(images: ImageSet, loader: str = "torch", **data: object) -> Batch:
    config = Config(
        data=DataConfig(name="folder", loader=loader, **{"workers": 0, "max_bad": 0.5, **data}),  # type: ignore[arg-type]
        augment=AUGMENT,
        optim=OptimConfig(global_batch=len(images)),
    )  # fmt: skip
    options = {"rank": 0, "world_size": 1, "device": torch.device("cpu")}
    (batch,) = build_loader(config, images, **options).epoch(0)  # type: ignore[arg-type]
    assert batch.view1.isfinite().all() and batch.view2.isfinite().all()
    return batch


def assert_good_ones(images: FileImages) -> None:
    """The eight good images, with the labels of their folders."""
    assert [images.path(i).name for i in range(len(images))] == [f"{i}.jpg" for i in range(8)]
    assert images.classes == ["a", "b"]
    assert images.labels is not None and images.labels.tolist() == [0] * GOOD + [1] * GOOD


@pytest.mark.parametrize("verify", ["header", "full"])
@pytest.mark.parametrize(("data", "name", "expected"), USED.values(), ids=USED)
def test_an_odd_image_is_used_with_stated_pixels(
    data: bytes, name: str, expected: Pixels, verify: str, root: Path, tmp_path: Path
) -> None:
    path = file(data, name)(root / "train/b")
    images = read_in(root, tmp_path, verify)
    assert len(images) == 2 * GOOD + 1 and rows(tmp_path) == []
    (odd,) = [i for i in range(len(images)) if images.path(i) == path]
    assert images.labels is not None and images.labels[odd] == 1
    assert images.sizes[odd].tolist() == list(expected.shape[:2])
    np.testing.assert_array_equal(images.read(odd), expected)
    assert "\n" not in images.name(odd)

    batch = epoch_of(images)
    assert sorted(batch.indices.tolist()) == list(range(len(images)))
    others = [epoch_of(images, "dali")] if HERE else []
    if expected.shape == PIXELS.shape:  # all of one size: they can be resident
        stack = np.stack([images.read(i) for i in range(len(images))])
        others.append(epoch_of(PixelImages(stack, images.labels, images.classes), "resident"))
    for other in others:
        assert torch.equal(other.indices, batch.indices)
        assert torch.equal(other.labels, batch.labels)
        off = 255 * 0.229 * (other.view1 - batch.view1).abs()
        assert (off > 4).double().mean() <= 0.02 and off.flatten(1).mean(1).max() <= 2.0


@pytest.mark.parametrize("verify", ["header", "full"])
@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD)
def test_a_bad_file_is_left_out_and_listed_with_its_reason(
    make: Make, reason: str, verify: str, root: Path, tmp_path: Path
) -> None:
    path = make(root / "train/a")
    images = read_in(root, tmp_path, verify)
    assert_good_ones(images)
    epoch_of(images)
    ((named, why),) = rows(tmp_path)
    assert named == str(path)
    assert any(part in why for part in reason.split("|")), why


@pytest.mark.parametrize("verify", ["header", "full"])
def test_a_file_that_may_not_be_read_is_a_bad_one(verify: str, root: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # tmp_path is private
        everybody_s = Path(name)
        everybody_s.chmod(0o777)
        shutil.move(root / "train", everybody_s)
        path = file(PNG, "odd.png")(everybody_s / "train/a")
        path.chmod(0)
        with as_somebody_else():
            assert_good_ones(read_in(everybody_s, everybody_s, verify))
            assert rows(everybody_s) == [[str(path), "permission denied"]]
        path.chmod(0o644)  # its time of change stays, so nothing may be remembered of it
        assert len(read_in(everybody_s, everybody_s, verify)) == 2 * GOOD + 1


@pytest.mark.parametrize(("data", "name"), DAMAGED.values(), ids=DAMAGED)
def test_damage_in_the_middle_is_found_by_full_verification(
    data: bytes, name: str, root: Path, tmp_path: Path
) -> None:
    file(data, name)(root / "train/a")
    assert len(read_in(root, tmp_path)) == 2 * GOOD + 1
    assert_good_ones(read_in(root, tmp_path, "full"))
    assert [Path(path).name for path, _ in rows(tmp_path)] == [name]


def damage(images: FileImages, i: int) -> None:
    images.path(i).write_bytes(DAMAGED["damaged PNG data"][0])


def vanish(images: FileImages, i: int) -> None:
    images.path(i).unlink()


def change(images: FileImages, i: int) -> None:
    LINE.save(images.path(i), "PNG")


def cut_off(images: FileImages, i: int) -> None:
    images.path(i).write_bytes(images.path(i).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("loader", "workers"), [("torch", 0), ("torch", 2), pytest.param("dali", 1, marks=needs_dali)]
)
@pytest.mark.parametrize("spoil", [damage, vanish, change, cut_off])
def test_a_file_that_turns_bad_while_training_is_replaced_by_the_next_and_listed(
    spoil: Callable[[FileImages, int], None],
    loader: str,
    workers: int,
    root: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    images = read_in(root, tmp_path)
    before = epoch_of(images, loader)
    for i in (2, 3, 7):
        spoil(images, i)
    batch = epoch_of(images, loader, workers=workers)
    shown = {2: 4, 3: 4, 7: 0}
    assert batch.indices.tolist() == [shown.get(i, i) for i in before.indices.tolist()]
    assert images.labels is not None
    assert batch.labels.tolist() == images.labels[batch.indices].tolist()
    place = {i: k for k, i in enumerate(before.indices.tolist())}
    for i in range(8):  # the views are those that the shown image has in this epoch anyway
        assert torch.equal(batch.view1[place[i]], before.view1[place[shown.get(i, i)]])
    assert {Path(path).name for path, _ in rows(tmp_path)} == {"2.jpg", "3.jpg", "7.jpg"}
    assert capfd.readouterr().out.count("the next image takes its place") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_leaves_out_what_cannot_be_read(
    workers: int, root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = read_in(root, tmp_path)
    config = Config(
        data=DataConfig(name="folder", workers=workers, max_bad=0.3), augment=AUGMENT
    )  # fmt: skip
    flat, cpu = torch.nn.Flatten(), torch.device("cpu")
    before, all_of_them = embed(flat, images, config, cpu, batch=3)
    assert all_of_them.tolist() == list(range(8))
    damage(images, 2)
    vanish(images, 7)
    for _ in range(2):  # told and listed once
        features, kept = embed(flat, images, config, cpu, batch=3)
        assert kept.tolist() == [0, 1, 3, 4, 5, 6]
        assert torch.equal(features, before[kept])
    assert {Path(path).name for path, _ in rows(tmp_path)} == {"2.jpg", "7.jpg"}
    assert len(rows(tmp_path)) == 2
    assert capfd.readouterr().out.count("evaluation leaves it out") == 1
    few = Subset(images, np.array([0, 2]))  # as the bank of the kNN while training
    with pytest.raises(DataError, match=r"2\.jpg .* lost 1 of 2 images.*--data\.max-bad"):
        embed(flat, few, config, cpu, batch=3)
    stop = replace(config, data=replace(config.data, on_bad_image="stop"))
    with pytest.raises(DataError, match=r"2\.jpg cannot be read as an image"):
        embed(flat, images, stop, cpu, batch=3)


def evaluation_on_a_rank(root: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    images = read_in(root, tmp_path)
    dist.barrier()  # every rank has read the index of all files
    (root / "train/a/1.jpg").unlink(missing_ok=True)
    dist.barrier()
    config = Config(data=DataConfig(name="folder", max_bad=0.3), augment=AUGMENT)
    features, kept = embed(torch.nn.Flatten(), images, config, torch.device("cpu"), batch=3)
    return {"features": features, "kept": kept}


def test_ranks_agree_on_what_evaluation_leaves_out(root: Path, tmp_path: Path) -> None:
    found = run_ranks(3, evaluation_on_a_rank, root, tmp_path, tmp_path=tmp_path, timeout=TIMEOUT)
    for rank_s in found:
        assert rank_s["kept"].tolist() == [0, 2, 3, 4, 5, 6, 7]
        assert torch.equal(rank_s["features"], found[0]["features"])
        assert len(rank_s["features"]) == 7 and (rank_s["features"] != 0).any(dim=1).all()


def test_a_lost_file_is_listed_under_its_escaped_name(root: Path, tmp_path: Path) -> None:
    path = file(PNG, "odd\\\n\t\udcff.png")(root / "train/b")
    images = read_in(root, tmp_path)
    path.unlink()
    epoch_of(images)
    reason = "cannot be read as an image (no such file or directory)"
    assert rows(tmp_path) == [[str(path.parent / r"odd\\\n\t\udcff.png"), reason]]


@pytest.mark.parametrize("loader", DECODING)
@pytest.mark.parametrize("spoil", [damage, vanish])
def test_losing_too_many_files_stops_the_run(
    spoil: Callable[[FileImages, int], None], loader: str, root: Path, tmp_path: Path
) -> None:
    images = read_in(root, tmp_path)
    spoil(images, 5)
    with pytest.raises(DataError, match=r"5\.jpg .*lost 1 of 8 images.*--data\.max-bad 0\.1"):
        epoch_of(images, loader, max_bad=0.1)
    with pytest.raises(DataError, match=r"5\.jpg cannot be read as an image"):
        epoch_of(images, loader, on_bad_image="stop")
    for i in (0, 1, 2, 3, 4, 6, 7):
        spoil(images, i)
    with pytest.raises(DataError, match="nor can any of the"):
        epoch_of(images, loader, max_bad=1.0)


@pytest.mark.parametrize("make", IGNORED.values(), ids=IGNORED)
def test_what_is_no_image_of_its_own_is_ignored(make: Make, root: Path, tmp_path: Path) -> None:
    make(root / "train/a")
    images = read_in(root, tmp_path)
    assert_good_ones(images)
    assert rows(tmp_path) == []


def test_a_class_whose_files_are_all_bad_keeps_its_label(root: Path, tmp_path: Path) -> None:
    file(b"", "odd.png")(root / "train/aa")
    images = read_in(root, tmp_path)
    assert images.classes == ["a", "aa", "b"]
    assert images.labels is not None and images.labels.tolist() == [0] * GOOD + [2] * GOOD


# ---- how many are too many -------------------------------------------------------------------


def test_few_bad_files_are_told_once_and_too_many_stop_the_run(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("odd\n1.png", "odd2.png"):
        file(b"", name)(root / "train/a")
    assert len(read_in(root, tmp_path, max_bad=0.2)) == 8  # 2 of 10
    told = capfd.readouterr().out
    assert told.count("\n") == 1 and r"2 of 10 images" in told and r"odd\n1.png (empty)" in told
    assert str(tmp_path / "bad_files.tsv") in told
    stopping = {"max_bad": 0.19}, {"max_bad": 0.001}, {"on_bad_image": "stop", "max_bad": 1.0}
    for options in stopping:
        with pytest.raises(DataError, match=r"2 of 10 images under .* the first is .*odd\\n1\.png"):
            read_in(root, tmp_path, **options)
        assert len(rows(tmp_path)) == 2  # all are listed all the same


def test_a_folder_of_bad_files_only_is_refused(tmp_path: Path) -> None:
    file(b"", "odd.png")(tmp_path)
    with pytest.raises(DataError, match=r"1 of 1 images.*repair or remove them$"):
        load_folder(tmp_path, "train", DataConfig(name="folder", max_bad=1.0))


def test_an_earlier_start_s_list_does_not_stay(root: Path, tmp_path: Path) -> None:
    path = file(b"", "odd.png")(root / "train/a")
    read_in(root, tmp_path)
    assert len(rows(tmp_path)) == 1
    path.unlink()
    read_in(root, tmp_path)
    assert not (tmp_path / "bad_files.tsv").exists()


# ---- several ranks ---------------------------------------------------------------------------


def on_a_rank(root: Path, tmp_path: Path) -> tuple[int, str]:
    images = read_in(root, tmp_path)
    return len(images), images.digest


def test_ranks_see_one_set_and_one_of_them_lists_what_is_bad(root: Path, tmp_path: Path) -> None:
    path = file(b"", "odd.png")(root / "train/a")
    seen = run_ranks(2, on_a_rank, root, tmp_path, tmp_path=tmp_path, timeout=TIMEOUT)
    assert seen == [on_a_rank(root, tmp_path)] * 2 and seen[0][0] == 8
    assert rows(tmp_path) == [[str(path), "empty"]]


def trainer_on_a_rank(roots: list[str], tmp_path: Path) -> str:
    data = DataConfig(name="folder", root=roots[rank()], workers=0)
    config = replace(tiny(global_batch=4), data=data, augment=AUGMENT)
    try:
        with RunFolder.open(str(tmp_path / "run"), config, overwrite=True, rank=rank()) as folder:
            Trainer(config, folder, torch.device("cpu"))
    except DataError as error:
        return str(error)
    return ""


def test_ranks_that_see_different_files_do_not_train(root: Path, tmp_path: Path) -> None:
    other = shutil.copytree(root, tmp_path / "other")
    (other / "train/a/0.jpg").rename(other / "train/a/00.jpg")
    roots = [str(root), str(other)]
    told = run_ranks(2, trainer_on_a_rank, roots, tmp_path, tmp_path=tmp_path, timeout=TIMEOUT)
    assert all("the ranks do not see the same images in --data.root" in text for text in told)


# ---- memory, and files that nobody thought of ------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
from rdm_fast.config import DataConfig
from rdm_fast.data.images.folder import load_folder
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = DataConfig(name="folder", verify="full", max_bad=0.5)
load_folder(Path(sys.argv[1]), "train", config)
before = peak()
images = load_folder(Path(sys.argv[2]), "train", config)
print(len(images), peak() - before)
"""


def test_refusing_bombs_takes_little_memory(root: Path, tmp_path: Path) -> None:
    (tmp_path / "bombs").mkdir()
    for i in range(3):
        file(bomb(14_000), f"bomb{i}.png")(tmp_path / "bombs")
        file(png(30_000, 30_000, 8, 0, b""), f"hollow{i}.png")(tmp_path / "bombs")
    for i in range(8):
        file(JPEG, f"{i}.jpg")(tmp_path / "bombs")
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(root), str(tmp_path / "bombs")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    number, kibibytes = measured.stdout.splitlines()[-1].split()
    assert int(number) == 8 and int(kibibytes) < 100 * 1024


BASES = [JPEG, PNG, GIF, WEBP, APNG, RGB16, encode(PALETTE, "TIFF"), encode(PICTURE, "BMP"), PGM16]


@settings(max_examples=150)
@given(
    st.sampled_from(BASES), st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1)), max_size=4)
)
def test_no_damage_crashes_a_look_and_what_it_accepts_can_be_decoded(
    base: bytes, damage: list[tuple[float, bytes]]
) -> None:
    data = base
    for where, new in damage:
        data = patched(data, int(where * len(data)), new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header, whole = (look(io.BytesIO(data), full=full) for full in (False, True))
        if isinstance(whole, Header):
            assert header == whole
            assert decode(io.BytesIO(data), "x").shape == (whole.height, whole.width, 3)
        else:
            with pytest.raises(DataError, match=r"^x cannot be read as an image \(.+\)$") as caught:
                decode(io.BytesIO(data), "x")
            assert "\n" not in str(caught.value)
