"""rdm_fast.data.images.folder: which files count, which label they have, and what is refused."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from rdm_fast.config import DataConfig
from rdm_fast.data.images.datasets import load
from rdm_fast.data.images.folder import load_folder
from rdm_fast.data.images.sets import FileImages, ImageSet
from rdm_fast.errors import DataError, InputMissing, UserError


def put(root: Path, *names: str) -> None:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 + i, 10), (i, 0, 0)).save(path, "PNG")


def refused(kind: type[UserError], function: Callable[..., object], *args: object) -> str:
    with pytest.raises(kind) as caught:
        function(*args)
    return str(caught.value)


def names(images: ImageSet) -> list[str]:
    assert isinstance(images, FileImages)
    return [images.path(i).name for i in range(len(images))]


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path, "train/b/1.png", "train/a/2.png", "train/a/10.JPG")
    put(tmp_path, "val/b/3.png", "val/a/4.png")
    train, test = (
        load(DataConfig(name="folder", root=str(tmp_path)), s) for s in ("train", "test")
    )
    assert train.classes == test.classes == ["a", "b"]
    assert train.labels is not None and train.labels.tolist() == [0, 0, 1]
    assert names(train) == ["10.JPG", "2.png", "1.png"]
    assert test.labels is not None and test.labels.tolist() == [0, 1]
    assert train.sizes.tolist() == [[10, 12], [10, 11], [10, 10]]
    assert train.read(1)[0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("where", ["", "train/"])
def test_images_without_class_folders_have_no_labels(tmp_path: Path, where: str) -> None:
    put(tmp_path, f"{where}2.png", f"{where}1.png")
    images = load_folder(tmp_path, "train")
    assert images.labels is None and images.classes == []
    assert names(images) == ["1.png", "2.png"]


def test_an_empty_class_folder_gets_no_label(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/c/2.png", "test/a/3.png", "test/c/4.png")
    (tmp_path / "train/b").mkdir()
    (tmp_path / "test/c/4.png").unlink()
    train, test = load_folder(tmp_path, "train"), load_folder(tmp_path, "test")
    assert train.classes == test.classes == ["a", "c"]
    assert train.labels is not None and train.labels.tolist() == [0, 1]
    assert test.labels is not None and test.labels.tolist() == [0]


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/a/2.png", "store/b/3.png", "store/4.png")
    (tmp_path / "train/a/loop").symlink_to(tmp_path / "train/a")
    (tmp_path / "train/a/up").symlink_to(tmp_path / "train")
    (tmp_path / "train/b").symlink_to(tmp_path / "store/b")
    (tmp_path / "train/b2").symlink_to(tmp_path / "store/b")
    (tmp_path / "train/a/4.png").symlink_to(tmp_path / "store/4.png")
    (tmp_path / "train/a/5.png").symlink_to(tmp_path / "store/4.png")
    images = load_folder(tmp_path, "train")
    assert names(images) == ["1.png", "2.png", "4.png", "3.png"]
    assert images.classes == ["a", "b"]


def test_order_and_digest_do_not_depend_on_the_file_system(tmp_path: Path) -> None:
    files = [f"train/{c}/{i}.png" for c in "ab" for i in range(6)]
    put(tmp_path / "one", *files)
    for name in reversed(files):
        target = tmp_path / "two" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / "one" / name, target)
    one, two = (load_folder(tmp_path / x, "train") for x in ("one", "two"))
    assert names(one) == names(two) and one.digest == two.digest
    (tmp_path / "two/train/a/0.png").unlink()
    assert load_folder(tmp_path / "two", "train").digest != one.digest


@pytest.mark.parametrize(
    ("files", "root", "kind", "named"),
    [
        (["train/readme.md"], "", DataError, ["--data.root", "readme.md"]),
        (["train/a/1.png", "train/2.png"], "", DataError, ["2.png"]),  # labeled or not
        (["train/a/1.png", "val/z/1.png"], "", DataError, ["class z"]),
        (["readme.md", "docs/readme.md"], "", InputMissing, ["--data.root", "docs"]),
        (["cats/1.png"], "nowhere/at/all", InputMissing, ["--data.root", "at/all", "cats"]),
        (["file.png"], "file.png", InputMissing, ["--data.root", "file.png is a file"]),
    ],
)
def test_a_folder_that_does_not_fit_is_named(
    files: list[str], root: str, kind: type[UserError], named: list[str], tmp_path: Path
) -> None:
    put(tmp_path, *files)
    split = "test" if "val/z/1.png" in files else "train"
    assert all(part in refused(kind, load_folder, tmp_path / root, split) for part in named)


# ---- some of the classes ---------------------------------------------------------------------


@pytest.fixture
def four_classes(tmp_path: Path) -> Path:
    put(tmp_path / "data", *(f"{s}/{c}/{s}{c}.png" for s in ("train", "val") for c in "dcba"))
    return tmp_path / "data"


def listed(tmp_path: Path, text: str) -> DataConfig:
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8")
    return DataConfig(
        name="folder", root=str(tmp_path / "data"), classes=str(tmp_path / "classes.txt")
    )


def test_a_class_list_selects_and_does_not_order(four_classes: Path, tmp_path: Path) -> None:
    config = listed(tmp_path, "# two of four\r\nd\r\n\n  b \nd\n")
    train, test = load(config, "train"), load(config, "test")
    assert train.classes == test.classes == ["b", "d"]
    assert names(train) == ["trainb.png", "traind.png"] and names(test) == ["valb.png", "vald.png"]
    assert train.labels is not None and train.labels.tolist() == [0, 1]
    everything = load(DataConfig(name="folder", root=str(four_classes)), "train")
    assert len(everything) == 4 and everything.digest != train.digest
    (four_classes / "train/stray.png").write_bytes(b"")  # a stray file does not matter
    assert load(config, "train").digest == train.digest


def test_a_class_list_that_does_not_fit_is_refused(four_classes: Path, tmp_path: Path) -> None:
    (four_classes / "train/f").mkdir()
    for text, kind, named in (
        ("a\ne\n", InputMissing, "such as e; "), ("f", InputMissing, "such as f"),
        ("# none\n", DataError, "classes.txt"),
    ):  # fmt: skip
        message = refused(kind, load, listed(tmp_path, text), "train")
        assert named in message and "classes.txt" in message
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    for name, kind in (("nowhere", InputMissing), ("binary", DataError)):
        config = replace(listed(tmp_path, ""), classes=str(tmp_path / name))
        assert f"--data.classes {tmp_path / name}" in refused(kind, load, config, "train")
