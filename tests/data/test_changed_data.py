"""A run that is resumed on other images than it was started with."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rdm_fast.config import AugmentConfig, Config, DataConfig
from rdm_fast.data.images.datasets import load
from rdm_fast.errors import ConfigMismatch
from tests.data.files import PNG
from tests.runs import final_state, run, run_to
from tests.tiny import tiny


def config_of(root: Path) -> Config:
    data = DataConfig(name="folder", root=str(root), loader="torch", workers=0, max_bad=0.5)
    small = tiny("digits_simsiam", global_batch=4)
    return replace(small, data=data, augment=AugmentConfig(size=16))


@pytest.fixture
def stopped(root: Path, tmp_path: Path) -> Path:
    """A run of four steps that was stopped after three."""
    run_to(tmp_path / "run", config_of(root), 3)
    return tmp_path / "run"


CHANGES: dict[str, Callable[[Path], object]] = {
    "renamed": lambda train: (train / "a/1.jpg").rename(train / "a/one.jpg"),
    # order and names in a class stay as they were
    "relabeled": lambda train: (train / "b/4.jpg").rename(train / "a/4.jpg"),
    "removed": lambda train: (train / "b/7.jpg").unlink(),
    # the index leaves it out, so that the order of the others is another
    "spoiled": lambda train: (train / "b/7.jpg").write_bytes(b"no image"),
    "rewritten": lambda train: (train / "b/7.jpg").write_bytes(PNG),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_data_is_refused(change: Callable[[Path], object], root: Path, stopped: Path) -> None:
    before = final_state(stopped)
    change(root / "train")
    with pytest.raises(ConfigMismatch) as caught:
        run(stopped, config_of(root))
    assert caught.value.code == 78
    assert f"--data.root {root}" in str(caught.value) and str(stopped) in str(caught.value)
    assert final_state(stopped) == before


def test_the_same_images_elsewhere_are_taken(root: Path, stopped: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(root, tmp_path / "moved"))
    shutil.rmtree(root)
    run(stopped, config_of(moved))
    assert final_state(stopped)["step"] == "4"


def test_a_run_whose_images_are_not_known_goes_on(root: Path) -> None:
    """One that was started before checkpoints said what it was trained on."""
    load(config_of(root).data, "train").require_digest(None, Path("run"), "data")
