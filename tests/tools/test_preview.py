"""rdm_fast.tools.preview: the contact sheet of a recipe."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_fast.config.recipes import recipe
from rdm_fast.data.images.datasets import load
from rdm_fast.data.loaders.batch import Batch
from rdm_fast.tools.preview import CELL, GAP, TITLE, contact_sheet, first_batches, levels_of
from tests.data.files import Pixels, natural
from tests.data.loaders.dali_here import HERE
from tests.runs import CPU, rdm


def test_a_sheet_has_rows_and_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sheet.png"
    assert rdm("preview digits_simsiam --device cpu --images 3 --sheet", path) == 0
    columns = 5 + 2 * HERE
    side = CELL + GAP  # a cell is a multiple of the 16 pixels of a view of digits
    assert Image.open(path).size == (columns * side + GAP, 3 * side + GAP + TITLE)
    printed = capsys.readouterr().out
    assert "resident: 0.0" in printed
    assert f"{path}: 3 images of digits, torch, resident" in printed


def test_an_unwritable_sheet_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none" / "sheet.png"
    assert rdm("preview digits_simsiam --device cpu --images 2 --sheet", path) == 73
    assert f"--sheet {path}" in capsys.readouterr().err


def test_every_loader_shows_the_same_views_of_digits() -> None:
    config = recipe("digits_simsiam")
    config = replace(config, optim=replace(config.optim, global_batch=32))
    made = first_batches(config, load(config.data, "train"), CPU)
    assert list(made) == ["torch", "resident"] + ["dali"] * HERE
    first = levels_of(made["torch"], config.augment)
    for batch in made.values():
        assert torch.equal(batch.indices, made["torch"].indices)
        for found, expected in zip(levels_of(batch, config.augment), first, strict=True):
            assert np.abs(found.astype(int) - expected).mean() <= 0.5


def test_levels_are_those_before_normalization() -> None:
    augment = recipe("cifar10_byol").augment
    levels = np.random.default_rng(0).integers(0, 256, (2, 2, 8, 8, 3), dtype=np.uint8)
    views = torch.from_numpy(levels).permute(0, 1, 4, 2, 3) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (augment.mean, augment.std))
    view1, view2 = (views - mean) / std
    none = torch.zeros(2, dtype=torch.int64)
    made = levels_of(Batch(view1.half(), view2, none, none), augment)
    assert (np.abs(made[0].astype(int) - levels[0]) <= 1).all()  # the rounding of float16
    np.testing.assert_array_equal(made[1], levels[1])


def cells(original: Pixels, views: list[Pixels]) -> list[Pixels]:
    """The cells of a sheet of one row."""
    sheet = np.asarray(contact_sheet([original], {"torch": views}))
    return [
        sheet[TITLE + GAP :, GAP + k * (CELL + GAP) :][:CELL, :CELL] for k in range(1 + len(views))
    ]


def test_each_picture_is_in_its_cell() -> None:
    views = [np.full((1, 32, 32, 1), level, np.uint8) for level in (50, 200)]
    original, *shown = cells(natural(1, 20, 40)[0], views)
    assert (original[: CELL // 4] == 255).all() and (original[CELL // 2] != 255).any()
    assert (shown[0] == 50).all() and (shown[1] == 200).all()


def test_small_views_are_shown_small() -> None:
    large, small = np.full((1, 32, 32, 3), 50, np.uint8), np.full((1, 16, 16, 3), 200, np.uint8)
    cell = cells(large[0], [large, large, small])[3]
    quarter = CELL // 4
    assert (cell[quarter:-quarter, quarter:-quarter] == 200).all()
    assert (cell[:quarter] == 255).all() and (cell[:, -quarter:] == 255).all()
