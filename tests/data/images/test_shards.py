"""WebDataset shards: images, order and labels are those of files, or one error."""

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_fast.config import AugmentConfig, Config, DataConfig
from rdm_fast.data.images import index, tar_members
from rdm_fast.data.images.datasets import Split, load
from rdm_fast.data.images.folder import load_folder
from rdm_fast.data.images.shards import ShardImages, expand
from rdm_fast.errors import DataError, InputMissing, UserError
from tests.data.files import encode, natural, put
from tests.data.loaders.dali_here import DECODING
from tests.data.loaders.test_build import batches, configure, same
from tests.runs import final_state, run, run_with_stops
from tests.tiny import tiny

JPEGS = [encode(Image.fromarray(x), "JPEG") for x in natural(8, 24, 20)]


def pack(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(numbers: range, label: str = "cls") -> dict[str, bytes]:
    """JPEG files and their labels, 0 for the first four, else 1."""
    members: dict[str, bytes] = {}
    for i in numbers:
        members[f"{i}.jpg"] = JPEGS[i]
        value = {"label": i // 4, "caption": "x"} if label == "json" else i // 4
        members[f"{i}.{label}"] = json.dumps(value).encode()
    return members


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight training images in two shards, two test images in one."""
    root = tmp_path / "shards"
    pack(root / "train/000.tar", samples(range(5)))
    pack(root / "train/001.tar", samples(range(5, 8), "json"))
    pack(root / "val/000.tar", samples(range(3, 5)))
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The training images as files."""
    for i, data in enumerate(JPEGS):
        put(tmp_path / "files/train" / "01"[i // 4] / f"{i}.jpg", data)
    return tmp_path / "files"


def read_in(
    root: Path, split: Split = "train", listing: Path | None = None, **data: object
) -> ShardImages:
    config = DataConfig(name="webdataset", root=str(root), **data)
    images = load(config, split, listing)
    assert isinstance(images, ShardImages)
    return images


def refused(root: Path, error: type[UserError], split: Split = "train") -> str:
    with pytest.raises(error) as caught:
        read_in(root, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_labels_and_sizes_are_those_of_the_files(root: Path, folder: Path) -> None:
    images, files = read_in(root), load_folder(folder, "train")
    assert len(images) == len(files) == 8 and images.classes == ["0", "1"]
    assert images.labels is not None and images.labels.tolist() == [0] * 4 + [1] * 4
    np.testing.assert_array_equal(images.sizes, files.sizes)
    for i in range(8):
        np.testing.assert_array_equal(images.read(i), files.read(i))
        assert images.file(i).tobytes() == JPEGS[i]
    assert images.name(5) == f"{root}/train/001.tar/5.jpg"
    test = read_in(root, "test")
    assert test.labels is not None and test.labels.tolist() == [0, 1]


@pytest.mark.parametrize("loader", DECODING)
def test_every_loader_gives_the_batches_of_the_files(loader: str, root: Path, folder: Path) -> None:
    config = configure(loader, workers=1, batch=4)
    files = batches(config, load_folder(folder, "train"), epoch=1)
    assert len(files) == 2
    for ours, theirs in zip(batches(config, read_in(root), epoch=1), files, strict=True):
        assert same(ours, theirs) and torch.equal(ours.labels, theirs.labels)
    rank_1 = batches(config, read_in(root), epoch=1, start=1, rank=1, world=2)
    assert torch.equal(rank_1[0].indices, files[1].indices[2:])


def test_shards_are_listed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_in(root)
    list_shard, inspect = (Mock(wraps=f) for f in (tar_members.list_shard, index.inspect_image))
    monkeypatch.setattr(tar_members, "list_shard", list_shard)
    monkeypatch.setattr(index, "inspect_image", inspect)
    again = read_in(root)
    assert not list_shard.called and not inspect.called and again.digest == before.digest
    pack(root / "train/001.tar", samples(range(6, 8)))
    changed = read_in(root)
    opened = [call.args[0].name for call in list_shard.call_args_list]
    assert opened == ["000.tar", "001.tar"] and len(changed) == 7
    assert changed.digest != before.digest
    for saved in (root / "train").glob(".rdm_fast_index*"):
        saved.write_bytes(b"damaged")
    assert read_in(root).digest == changed.digest


@pytest.mark.parametrize(("column", "value"), [("shard", 9), ("size", -1), ("label", 1 << 40)])
def test_a_foreign_listing_is_checked(column: str, value: int, root: Path) -> None:
    images = read_in(root)
    rewrite_listing(root, column, value)
    assert read_in(root).digest == images.digest


def test_a_place_beyond_a_shard_is_an_unreadable_image(root: Path) -> None:
    images = read_in(root)
    rewrite_listing(root, "offset", 10**12)
    with pytest.raises(DataError, match=r"0\.jpg has changed"):
        read_in(root).read(0)
    np.testing.assert_array_equal(read_in(root).read(1), images.read(1))


def rewrite_listing(root: Path, column: str, value: int) -> None:
    (listing,) = (root / "train").glob("*-members.npz")
    with np.load(listing) as saved:
        arrays = dict(saved)
    arrays["rows"][column][0] = value
    np.savez(listing, **arrays)


def test_other_members_are_ignored_and_labels_may_be_missing(tmp_path: Path) -> None:
    members = {
        "a/x.JPG": JPEGS[0], "a/x.txt": b"caption", "a/x.seg.png": b"mask", "a/._x.jpg": b"fork",
        "b/x.jpg": JPEGS[1], "b/x.json": b'{"caption": "none"}', "c.png": JPEGS[2], "c.cls": b"2\n",
    }  # fmt: skip
    shard = pack(tmp_path / "000.tar", members)
    with tarfile.open(shard, "a") as tar:
        link = tarfile.TarInfo("d.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    images = read_in(tmp_path)
    names = [Path(images.name(i)).relative_to(shard) for i in range(len(images))]
    assert [*map(str, names)] == ["a/x.JPG", "b/x.jpg", "c.png"]
    assert images.labels is not None and images.labels.tolist() == [-1, -1, 2]
    assert images.classes == ["0", "1", "2"]
    pack(shard, {"a.jpg": JPEGS[0]})
    assert read_in(tmp_path).labels is None


def test_bad_members_are_left_out_listed_and_replaced_later(root: Path, tmp_path: Path) -> None:
    shard = pack(root / "train/00.tar", {"x.jpg": JPEGS[0][:200], "x.cls": b"1"})  # the first
    listing = tmp_path / "bad_files.tsv"
    images = read_in(root, listing=listing, max_bad=0.5)
    assert [images.file(i).tobytes() for i in range(len(images))] == JPEGS
    assert f"\n{shard}/x.jpg\t" in listing.read_text()
    first = root / "train/000.tar"
    data = first.read_bytes()
    at = data.index(JPEGS[2])
    first.write_bytes(data[:at] + bytes(len(JPEGS[2])) + data[at + len(JPEGS[2]) :])
    config = configure("torch", batch=8)
    config = replace(config, data=replace(config.data, max_bad=0.5))
    (batch,) = batches(config, images)
    assert sorted(batch.indices.tolist()) == [0, 1, 3, 3, 4, 5, 6, 7]
    assert f"\n{first}/2.jpg\t" in listing.read_text()


def test_patterns_and_flat_folders_name_shards(root: Path, tmp_path: Path) -> None:
    assert expand("a-{08..11}.tar") == [f"a-{k}.tar" for k in ("08", "09", "10", "11")]
    assert expand("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    assert len(read_in(root / "train/{000..001}.tar")) == 8
    assert len(read_in(root / "train/001.tar")) == 3
    flat = tmp_path / "flat"
    pack(flat / "in1k-train-00.tar", samples(range(3, 6)))
    pack(flat / "in1k-validation-00.tar", samples(range(4, 6)))
    assert len(read_in(flat)) == 3 and len(read_in(flat, "test")) == 2


def test_missing_shards_are_named(root: Path, tmp_path: Path) -> None:
    missing = refused(root / "train/{000..003}.tar", InputMissing)
    assert "2 of 4 shards" in missing and missing.endswith("002.tar")
    for pattern, split in (("{3..1}", "train"), ("train/{000..001}.tar", "test"), ("no", "train")):
        assert f"--data.root {root / pattern}" in refused(root / pattern, InputMissing, split)
    (tmp_path / "empty").mkdir()
    assert "train shards" in refused(tmp_path / "empty", InputMissing)
    pack(tmp_path / "none/000.tar", {"x.txt": b"x"})
    assert "KEY.jpg" in refused(tmp_path / "none", DataError)


def test_a_test_label_that_training_does_not_have_is_refused(root: Path) -> None:
    pack(root / "val/000.tar", {"x.jpg": JPEGS[0], "x.cls": b"2"})
    assert "label 2" in refused(root, DataError, "test")


@pytest.mark.parametrize("fault", ["cut in a file", "cut in a header", "no header"])
def test_a_damaged_shard_is_named(fault: str, root: Path) -> None:
    shard = root / "train/001.tar"
    data = shard.read_bytes()
    header = data.index(b"6.jpg")
    end = header + (700 if fault == "cut in a file" else 100)
    shard.write_bytes(data[:header] + b"\xff" * 512 if fault == "no header" else data[:end])
    assert str(shard) in refused(root, DataError)


def test_a_compressed_shard_and_two_members_of_one_name_are_refused(root: Path) -> None:
    shard = pack(root / "train/001.tar", samples(range(3)), "w:gz")
    assert str(shard) in refused(root, DataError)
    pack(shard, samples(range(3)))
    with tarfile.open(shard, "a") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
    assert str(root / "train") in refused(root, DataError)


def test_a_run_stopped_and_resumed_ends_as_one_that_was_not(root: Path, tmp_path: Path) -> None:
    def config(root: Path) -> Config:
        data = DataConfig(name="webdataset", root=str(root), loader="torch", workers=0)
        small = tiny("digits_simsiam", global_batch=4)
        return replace(small, data=data, augment=AugmentConfig(size=16))

    run(tmp_path / "whole", config(root))
    run_with_stops(tmp_path / "parts", config(root), [1, 3])
    assert final_state(tmp_path / "whole") == final_state(tmp_path / "parts")
