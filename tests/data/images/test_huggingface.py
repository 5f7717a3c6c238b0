"""rdm_fast.data.images.huggingface: data sets that `datasets` writes here, read without network."""

import io
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rdm_fast.config import DataConfig
from rdm_fast.data import ImageSet
from rdm_fast.data.images import huggingface
from rdm_fast.data.images.datasets import load
from rdm_fast.errors import DataError, InputMissing, Unavailable, UsageError, UserError
from tests.data.files import DAMAGED, PNG, encode, epoch_of, natural, patched, put, rows
from tests.data.loaders.dali_here import DECODING
from tests.runs import metrics, rdm
from tests.tiny import command

# `datasets` takes seconds to import, so that no module here imports it when it is collected.

N = 12
CLASSES = ["cat", "dog", "owl"]
KINDS = [i % 3 for i in range(N)]


def pictures(side: int, n: int = N) -> list[bytes]:
    return [encode(Image.fromarray(pixels)) for pixels in natural(n, side, side)]


def cells(files: list[bytes]) -> list[Any]:
    return [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(files)]


def made(**columns: list[Any]) -> Any:
    """A data set; the name of a column decides its type."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as Picture

    types = {
        **{"picture": Picture(), "second": Picture(), "raw": Value("binary")},
        **{"animal": ClassLabel(names=CLASSES), "color": ClassLabel(names=["red", "blue"])},
        **{"number": Value("int64"), "word": Value("string"), "score": Value("float32")},
    }
    return Dataset.from_dict(columns, features=Features({name: types[name] for name in columns}))


def animals(side: int = 100, n: int = N) -> Any:
    return made(picture=cells(pictures(side, n)), animal=KINDS[:n])


def saved(root: Path, **splits: Any) -> Path:
    from datasets import DatasetDict

    DatasetDict(splits).save_to_disk(root)
    return root


def as_parquet(root: Path, **splits: Any) -> Path:
    """A folder as the Hub has it."""
    (root / "data").mkdir(parents=True)
    for name, split in splits.items():
        split.to_parquet(root / "data" / f"{name}-00000-of-00001.parquet")
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def read(root: Path, split: Any = "train", table: Path | None = None, **data: Any) -> ImageSet:
    return load(DataConfig(name="hf", root=str(root), **{"max_bad": 0.9, **data}), split, table)


def refused(kind: type[UserError], root: Path, split: str = "train", **data: Any) -> str:
    with pytest.raises(kind) as caught:
        read(root, split, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def decoded(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)))


# ---- what is read ----------------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 100])
@pytest.mark.parametrize("write", [saved, as_parquet])
def test_images_and_labels_come_back(write: Callable[..., Path], side: int, tmp_path: Path) -> None:
    """Small images of one size are decoded once, all others when they are read."""
    root = write(tmp_path / "set", train=animals(side), test=animals(side, 4))
    train, test = read(root), read(root, "test")
    assert (train.pixels is None) == (side == 100) and (len(train), len(test)) == (N, 4)
    assert train.labels is not None and train.labels.tolist() == KINDS
    assert train.classes == test.classes == CLASSES
    files = pictures(side)
    for images in (train, pickle.loads(pickle.dumps(train))):
        assert all((images.read(i) == decoded(files[i])).all() for i in range(N))
    if side == 100:
        assert [train.file(i).tobytes() for i in range(N)] == files
        assert train.name(3) == f"{root}/train[3] (3.png)"


def test_more_than_fits_is_decoded_when_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = saved(tmp_path / "set", train=animals(16))
    monkeypatch.setattr(huggingface, "MOST_DECODED", N * 16 * 16 * 3 - 1)
    assert read(root).pixels is None


def test_one_split_is_for_training_and_image_files_are_read_in_place(tmp_path: Path) -> None:
    files = [str(put(tmp_path / f"{i}.png", data)) for i, data in enumerate(pictures(100))]
    made(word=files).save_to_disk(root := tmp_path / "set")  # of an Image it would keep the bytes
    images = read(root, image_column="word")
    assert images.labels is None and not images.classes
    assert (images.read(5) == decoded(pictures(100)[5])).all() and not images.has_changed(5)
    os.utime(files[5])
    assert images.has_changed(5) and not images.has_changed(4)
    refused(InputMissing, root, "test")


@pytest.mark.parametrize("names", [["test", "validation"], ["test"], ["valid", "test"]], ids=str)
def test_validation_images_come_before_test_images(names: list[str], tmp_path: Path) -> None:
    splits = {name: animals(16, k + 2) for k, name in enumerate(names)}
    root = saved(tmp_path / "set", train=animals(16), **splits)
    best = next((name for name in names if name.startswith("valid")), "test")
    assert len(read(root, "test")) == len(splits[best])


COLUMNS: dict[str, tuple[list[Any], dict[str, Any], list[int], list[str]]] = {
    "number": ([3, 7, None, -1], {"number": [7, 3]}, [1, 0], ["3", "7"]),
    "word": (["b", "a", None, "c"], {"word": ["c", None]}, [2, -1], ["a", "b", "c"]),
    "animal": ([2, -1, None, 0], {"animal": [0, 2]}, [0, 2], CLASSES),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_labels_are_classes_whole_numbers_or_text(column: str, tmp_path: Path) -> None:
    values, test, expected, classes = COLUMNS[column]
    files = pictures(16, 4)
    root = saved(
        tmp_path / "set",
        train=made(raw=files, **{column: values}),
        test=made(raw=files[:2], **test),
    )
    named = {"image_column": "raw", "label_column": column}
    train = read(root, **named)
    known = {None: -1, -1: -1, **{n: i for i, n in enumerate(classes)}}
    asked = [values[i] if column == "animal" else known.get(str(v), known.get(v)) for i, v in
             enumerate(values)]  # fmt: skip
    assert train.labels is not None
    assert train.labels.tolist() == [-1 if label is None else label for label in asked]
    found = read(root, "test", **named)
    assert found.labels is not None and found.labels.tolist() == expected
    assert found.classes == train.classes == classes


def test_a_class_of_test_images_alone_is_refused(tmp_path: Path) -> None:
    files = cells(pictures(16, 2))
    train, test = (made(picture=files, word=words) for words in (["a", "b"], ["a", "z"]))
    root = saved(tmp_path / "set", train=train, test=test)
    assert " z," in refused(DataError, root, "test", label_column="word")


# ---- bad images ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 100])
def test_bad_rows_are_left_out_and_listed(side: int, tmp_path: Path, table: Path) -> None:
    """With damage in the middle, too, where all are decoded at the start, or `verify` is full."""
    good = pictures(side, 4)
    middle = patched(good[0], good[0].index(b"IDAT") + len(good[0]) // 2, b"\xaa" * 64)
    data = [*good[:2], None, b"", b"text", good[0][:99], middle, *good[2:]]
    column, verify = ("picture", "full") if side == 100 else ("raw", "header")
    root = saved(tmp_path / "set", train=made(**{column: data}, number=list(range(len(data)))))
    settings = {"image_column": column, "label_column": "number", "verify": verify}
    images = read(root, table=table, **settings)
    kept = [0, 1, len(data) - 2, len(data) - 1]
    assert images.labels is not None and images.labels.tolist() == kept
    expected = [f"{root}/train[{k}]" for k in range(len(data)) if k not in kept]
    assert [path for path, _ in rows(table)] == expected
    refused(DataError, root, **settings, max_bad=0.01)
    refused(DataError, root, **settings, on_bad_image="stop")


def test_rows_whose_files_cannot_be_read_are_bad(tmp_path: Path, table: Path) -> None:
    good = put(tmp_path / "a.png", PNG)
    names = ["/nowhere/b.png", str(good), "http://a/c.png", "zip://d.png::e.zip", None, "\0f.png"]
    made(word=[*names, "/dev/zero"]).save_to_disk(root := tmp_path / "set")
    images = read(root, image_column="word", table=table)
    assert len(images) == 1 and len(rows(table)) == len(names)


@pytest.mark.parametrize("loader", DECODING)
def test_a_row_with_damage_in_the_middle_is_replaced(
    loader: str, tmp_path: Path, table: Path
) -> None:
    data = pictures(100, 4)
    data[1] = DAMAGED["data.png"]
    made(picture=cells(data)).save_to_disk(root := tmp_path / "set")
    images = read(root, table=table)
    batch = epoch_of(images, loader, workers=1)
    assert sorted(batch.indices.tolist()) == [0, 2, 2, 3]
    assert [path for path, _ in rows(table)] == [f"{root}/train[1] (1.png)"]


# ---- which images they are -------------------------------------------------------------------


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    root = saved(tmp_path / "set", train=animals())
    digest = read(root).digest
    assert read(Path(shutil.copytree(root, tmp_path / "moved"))).digest == digest
    assert read(as_parquet(tmp_path / "parquet", train=animals())).digest == digest
    files = pictures(100)
    files[4] = files[4][:-1] + bytes([files[4][-1] ^ 1])  # of the same size
    others = {
        "a byte": made(picture=cells(files), animal=KINDS),
        "a label": made(picture=cells(pictures(100)), animal=[*KINDS[:-1], 0]),
        "a row less": animals(n=N - 1),
        "the order": animals().select(range(N - 1, -1, -1)),
    }
    assert digest not in [read(saved(tmp_path / k, train=v)).digest for k, v in others.items()]


# ---- one sentence ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "data", "named"),
    [
        ({"picture": 0, "second": 0}, {}, ["picture, second", "--data.image-column"]),
        ({"raw": 0}, {}, ["raw", "--data.image-column"]),
        ({"picture": 0, "animal": 1, "color": 1}, {}, ["animal, color", "--data.label-column"]),
        ({"picture": 0}, {"image_column": "pictures"}, ["--data.image-column pictures"]),
        ({"picture": 0}, {"label_column": "x"}, ["--data.label-column x", "picture"]),
        ({"picture": 0, "score": 2}, {"label_column": "score"}, ["--data.label-column score"]),
    ],
)
def test_a_column_that_is_not_clear_is_named(
    columns: dict[str, int], data: dict[str, str], named: list[str], tmp_path: Path
) -> None:
    values: list[list[Any]] = [pictures(16, 2), [0, 1], [0.5, 1.0]]
    content = {n: cells(values[0]) if k == 0 and n != "raw" else values[k]
               for n, k in columns.items()}  # fmt: skip
    root = saved(tmp_path / "set", train=made(**content))
    message = refused(UsageError, root, **data)
    assert not [text for text in named if text not in message]


def damaged(root: Path) -> Path:
    (file,) = saved(root, train=animals()).rglob("*.arrow")
    file.write_bytes(file.read_bytes()[:-9000])
    return root


def with_wrong_offsets(root: Path) -> Path:
    """The end of an image lies before its start; reading it would end the process."""
    (file,) = saved(root, train=made(raw=pictures(100, 4))).rglob("*.arrow")
    ends = np.cumsum([0, *map(len, pictures(100, 4))]).astype("<i4")
    wrong = ends.copy()
    wrong[2] = 2**30
    assert file.read_bytes().count(ends.tobytes()) == 1
    file.write_bytes(file.read_bytes().replace(ends.tobytes(), wrong.tobytes()))
    return root


BROKEN: dict[str, tuple[Callable[[Path], object], type[UserError], dict[str, str]]] = {
    "absent": (lambda _: None, InputMissing, {}),
    "empty": (Path.mkdir, InputMissing, {}),
    "a file": (lambda root: root.write_bytes(b""), InputMissing, {}),
    "no training images": (
        lambda root: saved(root, one=animals(16), two=animals(16)), InputMissing, {},
    ),
    "no rows": (lambda root: saved(root, train=made(picture=[])), DataError, {}),
    "truncated": (damaged, DataError, {}),
    "offsets": (with_wrong_offsets, DataError, {"image_column": "raw"}),
    "numbers": (
        lambda root: saved(root, train=made(score=[1.0])), DataError, {"image_column": "score"},
    ),
    "no parquet": (lambda root: put(root / "a.parquet", b"PAR1"), DataError, {}),
    "no table": (lambda root: put(root / "state.json", b"{"), DataError, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_one_sentence(case: str, tmp_path: Path) -> None:
    write, kind, data = BROKEN[case]
    write(root := tmp_path / "set")
    assert f"--data.root {root}" in refused(kind, root, **data)


def test_without_datasets_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "rdm-fast[hf]" in refused(Unavailable, tmp_path)


def test_a_data_set_that_the_hub_does_not_have_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import exceptions

    def absent(_: str) -> None:
        raise exceptions.DatasetNotFoundError("it is not there")

    monkeypatch.setattr("datasets.load_dataset", absent)
    assert "some/set" in refused(InputMissing, Path("some/set"))


# ---- whole runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 100])
def test_a_data_set_trains_and_evaluates(side: int, tmp_path: Path) -> None:
    root = saved(tmp_path / "set", train=animals(side), validation=animals(side, 6))
    flags = f"--data.name hf --data.root {root} --optim.global-batch 6 --log.knn-every 1 "
    flags += "--data.fraction 0.5 "
    flags += "--augment.mean 0.5 0.5 0.5 --augment.std 0.2 0.2 0.2 --data.workers 0 "
    flags += "--data.loader auto"
    assert rdm("train", *command(flags), "--out", tmp_path / "run") == 0
    found = [line["knn_top1"] for line in metrics(tmp_path / "run") if "knn_top1" in line]
    assert len(found) == 3
    table = tmp_path / "embeddings.npz"
    assert rdm("eval", tmp_path / "run", "--workers", 0, "--features-out", table) == 0
    with np.load(table) as arrays:  # the probe is trained on all images, whatever data.fraction is
        assert (len(arrays["train_labels"]), len(arrays["test_labels"])) == (N, 6)


def test_the_hub_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is in the cache is read; what is not is one line."""
    from datasets import load_dataset

    load_dataset(str(as_parquet(tmp_path / "set", train=animals(16))))
    (tmp_path / "cache/set").rename(tmp_path / "cache/some___set")
    for name in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{name}.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert len(read(Path("some/set"))) == N
    capfd.readouterr()
    assert rdm("train digits_simsiam --data.name hf --data.root other/set --out", "run") == 69
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: --data.root other/set ")
