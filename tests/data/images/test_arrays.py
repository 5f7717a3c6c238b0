"""rdm_fast.data.images.arrays: the packed format, written here by hand, and its refusals."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rdm_fast.config import DataConfig
from rdm_fast.data.images.arrays import load_arrays
from rdm_fast.data.images.datasets import load
from rdm_fast.errors import DataError, InputMissing, UserError
from tests.runs import metrics, rdm
from tests.tiny import command

DECODED = {
    "train_images": np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8),
    "train_label": np.array([0, 1, -1, 1]),
    "test_images": np.zeros((2, 8, 8), np.uint8),
    "test_label": np.array([1, 0], np.uint8),
    "classes": np.array(["cat", "dog"]),
}


def encoded(files: list[bytes]) -> dict[str, Any]:
    return {
        "train_jpeg": np.frombuffer(b"".join(files), np.uint8),
        "train_offset": np.cumsum([0, *map(len, files)]),
        "train_label": np.arange(len(files), dtype=np.uint8) % 2,
        "classes": np.array(["cat", "dog"]),
    }


def write(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


def refused(path: Path, kind: type[UserError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        load_arrays(path, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_decoded_arrays_come_back(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", DECODED)
    train = load(DataConfig(name="arrays", root=str(path)), "train")
    assert train.pixels is not None and train.labels is not None
    np.testing.assert_array_equal(train.pixels, DECODED["train_images"])
    assert train.labels.tolist() == [0, 1, -1, 1] and train.classes == ["cat", "dog"]
    test = load_arrays(path, "test")
    assert test.channels == 1 and test.read(0).shape == (8, 8, 1)


@pytest.mark.parametrize("step", [1, 4])
def test_encoded_images_come_back(step: int, tmp_path: Path, jpeg_files: list[bytes]) -> None:
    """Every fourth is of one size: such small ones are decoded once."""
    files = jpeg_files[2::step]
    images = load_arrays(write(tmp_path / "a.npz", encoded(files)), "train")
    assert (images.pixels is None) == (step == 1) and len(images) == len(files)
    for i, data in enumerate(files):
        expected = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(images.read(i), expected)
        assert images.sizes[i].tolist() == list(expected.shape[:2])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train_label": None, "train_labels": np.zeros(4, int)}, "no array train_label "),
        ({"classes": None}, "classes"),
        ({"train_images": None}, "train_jpeg"),
        ({"train_label": np.array([0, 1])}, "train_label has 2 labels for 4"),
        ({"train_label": np.array([0, 1, 2, 1])}, "train_label has labels from 0 to 2"),
        ({"train_label": np.array([0.5] * 4)}, "train_label is float64 [4]"),
        ({"train_images": np.zeros((4, 8, 8, 3))}, "train_images is float64"),
        ({"train_images": np.zeros((4, 8, 8, 2), np.uint8)}, "train_images is uint8 [4, 8, 8, 2]"),
        ({"train_images": np.zeros((0, 8, 8, 3), np.uint8)}, "train_images is uint8 [0, 8, 8, 3]"),
        ({"classes": np.array(["a", {}], object)}, "classes holds Python objects"),
    ],
)
def test_a_bad_array_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    arrays = {key: value for key, value in {**DECODED, **change}.items() if value is not None}
    assert named in refused(write(tmp_path / "a.npz", arrays))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train_offset": np.array([0, 5, 3])}, "train_offset falls after entry 1"),
        ({"train_offset": np.array([0, 10**9])}, "train_offset"),
        ({"train_offset": np.array([0])}, "train_offset"),
        ({"train_jpeg": np.zeros(9, np.uint16)}, "train_jpeg is uint16"),
        ({"train_offset": np.array([0, 5]), "train_label": np.array([0])}, "image 0 of"),
    ],
)
def test_a_bad_encoded_array_is_named(
    tmp_path: Path, jpeg_files: list[bytes], change: dict[str, Any], named: str
) -> None:
    assert named in refused(write(tmp_path / "a.npz", {**encoded(jpeg_files), **change}))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.npz", DECODED).read_bytes()
    flipped = bytearray(whole)
    flipped[300] ^= 1  # inside the first array: zip's checksum sees it
    for data, named in ((whole[:-40], "b.npz"), (b"", "b.npz"), (b"hello", "b.npz"),
                        (flipped, "train_images")):  # fmt: skip
        (tmp_path / "b.npz").write_bytes(data)
        assert named in refused(tmp_path / "b.npz")
    np.save(tmp_path / "c.npy", np.zeros(3))
    assert "c.npy" in refused(tmp_path / "c.npy")


def test_a_missing_file_is_named_with_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "other.npz", DECODED)
    for path in (tmp_path / "a.npz", tmp_path):
        message = refused(path, InputMissing)
        assert f"--data.root {path}" in message and "other.npz" in message


@pytest.mark.parametrize("left_out", [["train_label"], ["train_label", "test_label", "classes"]])
def test_images_without_labels_train_and_cannot_be_scored(
    left_out: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arrays = {key: value for key, value in DECODED.items() if key not in left_out}
    path = write(tmp_path / "a.npz", {**arrays, "test_images": DECODED["train_images"]})
    flags = f"--data.name arrays --data.root {path} --optim.global-batch 4 --log.knn-every 1 "
    flags += "--log.probe --augment.mean 0.5 0.5 0.5 --augment.std 0.2 0.2 0.2"
    assert rdm("train", *command(flags), "--out", tmp_path / "run") == 0
    logged = {key for line in metrics(tmp_path / "run") for key in line}
    assert "loss" in logged and not logged & {"knn_top1", "probe_top1"}
    assert capfd.readouterr().out.count("no kNN while training: ") == 1
    assert rdm("eval", tmp_path / "run") == 65
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: the training images have no labels, ") and "train_label" in line


def test_cifar10_as_jpeg_is_read(cifar10_npz: Path) -> None:
    images = load_arrays(cifar10_npz, "test")
    assert images.pixels is not None and images.pixels.shape == (10_000, 32, 32, 3)
    assert images.labels is not None and np.bincount(images.labels).tolist() == [1000] * 10
    assert "airplane" in images.classes
