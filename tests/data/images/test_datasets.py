"""rdm_fast.data.images.datasets against scikit-learn and against files in torchvision's layouts."""

import gzip
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import sklearn.datasets
import torchvision.datasets
from PIL import Image

from rdm_fast.config import DataConfig
from rdm_fast.data.images.datasets import load, load_digits, share_of
from rdm_fast.data.images.sets import PixelImages
from rdm_fast.errors import DataError, InputMissing, Unavailable
from tests.data.files import put


def test_digits_are_all_of_scikit_learns_once() -> None:
    train, test = load_digits("train"), load_digits("test")
    assert (len(train), len(test), train.channels) == (1400, 397, 1)
    digits = sklearn.datasets.load_digits()
    levels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    large = [Image.fromarray(x).resize((16, 16), Image.Resampling.BILINEAR) for x in levels]
    expected = zip([image.tobytes() for image in large], digits.target.tolist(), strict=True)
    pixels = [x.tobytes() for part in (train, test) for x in part.pixels]
    found = zip(pixels, [*train.labels.tolist(), *test.labels.tolist()], strict=True)
    assert sorted(found) == sorted(expected)
    assert train.classes == [str(i) for i in range(10)]


def test_digits_are_split_the_same_every_time_and_mixed() -> None:
    once, again = load_digits("test"), load_digits("test")
    assert once.digest == again.digest
    assert once.labels is not None and np.bincount(once.labels).min() > 25  # 40 on average


def make_cifar(root: Path, n: int, name: str) -> np.ndarray:
    """n images a file in CIFAR's format: [n, 3072] rows of planes."""
    rng = np.random.default_rng(0)
    ten = name == "cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    rows = rng.integers(0, 256, (len(files), n, 3072), dtype=np.uint8)
    for data, file in zip(rows, files, strict=True):
        entry = {"data": data, ("labels" if ten else "fine_labels"): list(range(n))}
        put(folder / file, pickle.dumps(entry))
    names = {("label_names" if ten else "fine_label_names"): [f"c{i}" for i in range(n)]}
    put(folder / ("batches.meta" if ten else "meta"), pickle.dumps(names))
    return rows


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_layout_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    rows = make_cifar(tmp_path, 3, name)
    config = DataConfig(name=name, root=str(tmp_path))
    train, test = load(config, "train"), load(config, "test")
    assert train.pixels is not None and test.labels is not None
    expected = rows[:-1].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(train.pixels, expected)
    np.testing.assert_array_equal(test.read(1), rows[-1, 1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert test.labels.tolist() == [0, 1, 2] and test.classes == ["c0", "c1", "c2"]


def test_stl10_trains_on_unlabeled_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda _: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (4, 3, 96, 96), dtype=np.uint8)
    for part, pixels in (("train", planes[:2]), ("unlabeled", planes[2:])):
        # the files are column-major
        (folder / f"{part}_X.bin").write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())
    (folder / "train_y.bin").write_bytes(bytes([1, 10]))
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    images = load(DataConfig(name="stl10", root=str(tmp_path)), "train")
    assert images.labels is not None and images.labels.tolist() == [0, 9, -1, -1]
    np.testing.assert_array_equal(images.pixels, planes.transpose(0, 2, 3, 1))


def test_fashion_mnist_has_one_channel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    files = {
        "images-idx3-ubyte": struct.pack(">IIII", 0x803, 5, 28, 28) + pixels.tobytes(),
        "labels-idx1-ubyte": struct.pack(">II", 0x801, 5) + bytes(range(5)),
    }
    for split in ("train", "t10k"):
        for name, data in files.items():
            put(tmp_path / f"FashionMNIST/raw/{split}-{name}", data)
            put(tmp_path / f"FashionMNIST/raw/{split}-{name}.gz", gzip.compress(data))
    images = load(DataConfig(name="fashion_mnist", root=str(tmp_path)), "test")
    assert images.channels == 1 and images.classes[0] == "T-shirt/top"
    np.testing.assert_array_equal(images.pixels, pixels[..., None])
    assert images.labels is not None and images.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "fashion_mnist"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_set_names_flag_place_and_way_out(name: str, split: str, tmp_path: Path) -> None:
    (tmp_path / "something-else").mkdir()
    config = DataConfig(name=name, root=str(tmp_path))
    with pytest.raises(InputMissing, match=r"--data\.root .*something-else.*--data\.download"):
        load(config, split)
    nowhere = DataConfig(name=name, root=str(tmp_path / "nowhere"))
    with pytest.raises(InputMissing, match=r"--data\.root .*nowhere"):
        load(nowhere, split)


def test_a_damaged_set_is_a_data_error(tmp_path: Path) -> None:
    make_cifar(tmp_path, 2, "cifar10")  # not the checksums of the real one
    with pytest.raises(DataError, match="cifar-10-batches-py"):
        load(DataConfig(name="cifar10", root=str(tmp_path)), "train")


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    config = DataConfig(name="cifar10", root=str(tmp_path), download=True)
    with pytest.raises(Unavailable, match=r"--data\.download .*no route to host"):
        load(config, "train")


# ---- data.fraction ---------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.5, 0.99])
def test_a_share_has_its_part_of_every_class_and_of_the_unlabeled(fraction: float) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([-1, 0, 1, 2], [500, 300, 150, 50]))
    images = PixelImages(np.zeros((1000, 8, 8, 1), np.uint8), labels, ["a", "b", "c"])
    part = share_of(images, fraction)
    assert len(part) == max(1, round(1000 * fraction)) and part.labels is not None
    assert (np.diff(part.indices) > 0).all()
    for label in (-1, 0, 1, 2):
        assert abs((part.labels == label).sum() - fraction * (labels == label).sum()) <= 1


def test_a_share_is_random_the_same_every_time_and_in_a_larger_one() -> None:
    images = PixelImages(np.zeros((1000, 8, 8, 1), np.uint8), None, [])
    quarter, half, again = (set(share_of(images, f).indices) for f in (0.25, 0.5, 0.25))
    assert quarter == again and quarter < half
    first = sum(i < 500 for i in half)
    assert 200 < first < 300  # mean 250, standard deviation 8


def test_only_training_images_are_shared_and_only_for_training() -> None:
    config = DataConfig(fraction=0.25)
    whole, part = load(DataConfig(), "train"), load(config, "train")
    assert len(part) == 350 and part.digest != whole.digest
    assert load(DataConfig(fraction=1.0), "train").digest == whole.digest
    assert load(config, "test").digest == load(DataConfig(), "test").digest
