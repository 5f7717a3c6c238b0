"""Files that turn bad during training or evaluation, on one rank and on several."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rdm_fast.config import Config, DataConfig
from rdm_fast.data.images.sets import FileImages, Subset
from rdm_fast.errors import DataError
from rdm_fast.evaluation.features import embed
from rdm_fast.run.folder import RunFolder
from rdm_fast.runtime.distributed import rank
from rdm_fast.training.trainer import Trainer
from tests.data.files import (
    AUGMENT,
    DAMAGED,
    PICTURE,
    PNG,
    encode,
    epoch_of,
    put,
    read_folder,
    rows,
)  # fmt: skip
from tests.data.loaders.dali_here import DECODING, needs_dali
from tests.ranks import run_ranks
from tests.tiny import tiny

CPU = torch.device("cpu")


def damage(path: Path) -> None:
    path.write_bytes(DAMAGED["data.png"])


def change(path: Path) -> None:
    path.write_bytes(encode(PICTURE.crop((0, 0, 80, 1))))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


SPOILS = [damage, Path.unlink, change, cut_off]


@pytest.mark.parametrize(
    ("loader", "workers"), [("torch", 0), ("torch", 2), pytest.param("dali", 1, marks=needs_dali)]
)
def test_the_next_image_takes_an_unreadable_ones_place(
    loader: str, workers: int, root: Path, table: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = read_folder(root, table)
    before = epoch_of(images, loader)
    shown = {2: 4, 3: 4, 5: 6, 7: 0}
    for i, spoil in zip(shown, SPOILS, strict=True):
        spoil(images.path(i))
    batch = epoch_of(images, loader, workers=workers)
    assert batch.indices.tolist() == [shown.get(i, i) for i in before.indices.tolist()]
    assert images.labels is not None
    assert batch.labels.tolist() == images.labels[batch.indices].tolist()
    place = {i: k for k, i in enumerate(before.indices.tolist())}
    for i in range(8):  # the views are those that the shown image has in this epoch anyway
        assert torch.equal(batch.view1[place[i]], before.view1[place[shown.get(i, i)]])
    assert {Path(path).name for path, _ in rows(table)} == {f"{i}.jpg" for i in shown}
    assert capfd.readouterr().out.count("warning: rank 0") == 1


def test_an_unreadable_file_is_listed_under_its_escaped_name(root: Path, table: Path) -> None:
    path = put(root / "train/b/odd\\\n\t\udcff.png", PNG)
    images = read_folder(root, table)
    path.unlink()
    epoch_of(images)
    ((name, reason),) = rows(table)
    assert name == str(path.parent / r"odd\\\n\t\udcff.png")
    assert "no such file or directory" in reason


@pytest.mark.parametrize("loader", DECODING)
@pytest.mark.parametrize("spoil", [damage, Path.unlink])
def test_too_many_stop_the_run(spoil: Callable[[Path], None], loader: str, root: Path) -> None:
    images = read_folder(root)
    spoil(images.path(5))
    with pytest.raises(DataError, match=r"5\.jpg .*--data\.max-bad"):
        epoch_of(images, loader, max_bad=0.0)
    with pytest.raises(DataError, match=r"5\.jpg"):
        epoch_of(images, loader, on_bad_image="stop")
    for i in (0, 1):
        spoil(images.path(i))
    epoch_of(images, loader, max_bad=0.001)  # three are few
    spoil(images.path(2))
    with pytest.raises(DataError, match=r"--data\.max-bad"):
        epoch_of(images, loader, max_bad=0.001)
    for i in (3, 4, 6, 7):
        spoil(images.path(i))
    with pytest.raises(DataError):
        epoch_of(images, loader, max_bad=1.0)


def embedded(images: FileImages | Subset, **data: object) -> tuple[torch.Tensor, list[int]]:
    """Views as evaluation shows them, and their images."""
    config = Config(
        data=DataConfig(name="folder", **{"workers": 0, "max_bad": 0.3, **data}), augment=AUGMENT
    )
    features, kept = embed(torch.nn.Flatten(), images, config, CPU, batch=3)
    return features, kept.tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_leaves_out_unreadable_images(
    workers: int, root: Path, table: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = read_folder(root, table)
    before, all_of_them = embedded(images, workers=workers)
    assert all_of_them == list(range(8))
    damage(images.path(2))
    images.path(7).unlink()
    for _ in range(2):  # one warning, one row
        features, kept = embedded(images, workers=workers)
        assert kept == [0, 1, 3, 4, 5, 6]
        assert torch.equal(features, before[kept])
    assert [Path(path).name for path, _ in rows(table)] == ["2.jpg", "7.jpg"]
    assert capfd.readouterr().out.count("warning: rank 0") == 1
    few = Subset(images, np.array([0, 2]))
    with pytest.raises(DataError, match=r"2\.jpg .*--data\.max-bad"):
        embedded(few, max_bad=0.0)
    with pytest.raises(DataError, match=r"2\.jpg"):
        embedded(images, on_bad_image="stop")


# ---- several ranks ---------------------------------------------------------------------------


def on_a_rank(root: Path, other: Path, table: Path) -> dict[str, object]:
    images = read_folder(root, table)
    found = {"n": len(images), "digest": images.digest, "rows": rows(table)}
    dist.barrier()  # every rank has read the index of all files
    (root / "train/a/1.jpg").unlink(missing_ok=True)
    dist.barrier()
    found["features"], found["kept"] = embedded(images)
    data = DataConfig(name="folder", root=str([root, other][rank()]), workers=0, max_bad=0.5)
    config = replace(tiny(global_batch=3), data=data, augment=AUGMENT)
    run = str(table.parent / "run")
    with (
        RunFolder.open(run, config, overwrite=True, rank=rank()) as folder,
        pytest.raises(DataError, match=r"--data\.root"),
    ):
        Trainer(config, folder, CPU)
    return found


def test_ranks_agree_on_bad_files(root: Path, table: Path, tmp_path: Path) -> None:
    bad = put(root / "train/a/odd.png", b"")
    other = Path(shutil.copytree(root, tmp_path / "other"))
    (other / "train/a/0.jpg").rename(other / "train/a/00.jpg")
    digest = read_folder(root).digest
    for found in run_ranks(2, on_a_rank, root, other, table, tmp_path=tmp_path):
        assert (found["n"], found["digest"]) == (8, digest)
        assert found["kept"] == [0, 2, 3, 4, 5, 6, 7] and len(found["features"]) == 7
        assert (found["features"] != 0).any(dim=1).all()
    assert (str(bad), "empty") in rows(table)
