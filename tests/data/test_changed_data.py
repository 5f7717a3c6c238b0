"""A run that is resumed on other images than it was started with."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from rdm_fast.config import AugmentConfig, Config, DataConfig
from rdm_fast.data.images.datasets import load
from rdm_fast.errors import ConfigMismatch
from tests.data.conftest import natural
from tests.runs import final_state, run, run_to
from tests.tiny import tiny


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four images in each of the classes a and b."""
    for i, pixels in enumerate(natural(8, 20, 20)):
        path = tmp_path / "data/train" / "ab"[i // 4] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "data"


def config_of(root: Path) -> Config:
    data = DataConfig(name="folder", root=str(root), loader="torch", workers=0, max_bad=0.5)
    return replace(
        tiny("digits_simsiam", global_batch=4), data=data, augment=AugmentConfig(size=16)
    )


@pytest.fixture
def stopped(root: Path, tmp_path: Path) -> Path:
    """A run of four steps that was stopped after three."""
    run_to(tmp_path / "run", config_of(root), 3)
    return tmp_path / "run"


def rename(root: Path) -> None:
    (root / "train/a/1.png").rename(root / "train/a/one.png")


def relabel(root: Path) -> None:
    """Order and names in a class stay as they were."""
    (root / "train/b/4.png").rename(root / "train/a/4.png")


def remove(root: Path) -> None:
    (root / "train/b/7.png").unlink()


def spoil(root: Path) -> None:
    """The index leaves it out, so that the order of the others is another."""
    (root / "train/b/7.png").write_bytes(b"no image")


def rewrite(root: Path) -> None:
    Image.new("RGB", (20, 20)).save(root / "train/b/7.png")


@pytest.mark.parametrize("change", [rename, relabel, remove, spoil, rewrite])
def test_changes_are_refused(change: Callable[[Path], None], root: Path, stopped: Path) -> None:
    before = final_state(stopped)
    change(root)
    with pytest.raises(ConfigMismatch) as caught:
        run(stopped, config_of(root))
    assert caught.value.code == 78
    assert f"the images in --data.root {root} are not those that the run in {stopped}" in str(
        caught.value
    )
    assert final_state(stopped) == before


def test_the_same_images_elsewhere_are_taken(root: Path, stopped: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(root, tmp_path / "moved"))
    shutil.rmtree(root)
    run(stopped, config_of(moved))
    assert final_state(stopped)["step"] == "4"


def test_a_run_whose_images_are_not_known_goes_on(root: Path) -> None:
    """One that was started before checkpoints said what it was trained on."""
    load(config_of(root).data, "train").require_digest(None, Path("run"), "data")
