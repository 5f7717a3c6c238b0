"""The contact sheet of a recipe."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_fast.data.images.datasets import load
from rdm_fast.data.loaders.batch import Batch
from rdm_fast.errors import CannotCreate, UsageError
from rdm_fast.tools.preview import (
    CELL,
    GAP,
    TITLE,
    contact_sheet,
    first_batches,
    levels_of,
    main,
    parse,
    preview,
)
from tests.data.conftest import Pixels, natural
from tests.data.loaders.dali_here import HERE


def test_a_sheet_of_digits_has_a_row_an_image_and_two_columns_a_loader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    preview(parse(["digits_simsiam", "--images", "3", "--device", "cpu", "--out", str(out)]))
    columns = 5 + 2 * HERE
    side = CELL + GAP  # digits' views have 16 pixels, which divide a cell
    assert Image.open(out).size == (columns * side + GAP, 3 * side + GAP + TITLE)
    printed = capsys.readouterr().out
    assert "resident: 0.0" in printed
    assert f"{out}: 3 images of digits, torch, resident" in printed


def test_it_shows_what_the_recipe_trains_on() -> None:
    config, _ = parse(["digits_simsiam", "--images", "4"])
    images = load(config.data, "train")
    made = first_batches(config, images, torch.device("cpu"))
    assert list(made) == ["torch", "resident"] + ["dali"] * HERE
    for batch in made.values():
        assert torch.equal(batch.indices, made["torch"].indices)


def test_small_views_are_shown_small() -> None:
    large, small = np.full((1, 32, 32, 3), 50, np.uint8), np.full((1, 16, 16, 3), 200, np.uint8)
    sheet = np.asarray(contact_sheet([large[0]], {"torch": [large, large, small]}))
    cell = sheet[TITLE + GAP :, GAP + 3 * (CELL + GAP) :][:CELL, :CELL]
    quarter = CELL // 4
    assert (cell[quarter:-quarter, quarter:-quarter] == 200).all()
    assert (cell[:quarter] == 255).all() and (cell[:, -quarter:] == 255).all()


def test_levels_are_those_before_normalization() -> None:
    config, _ = parse(["cifar10_byol"])
    levels = np.random.default_rng(0).integers(0, 256, (2, 2, 8, 8, 3), dtype=np.uint8)
    views = torch.from_numpy(levels).permute(0, 1, 4, 2, 3) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.augment.mean, config.augment.std))
    view1, view2 = (views - mean) / std
    none = torch.zeros(2, dtype=torch.int64)
    made = levels_of(Batch(view1.half(), view2, none, none), config.augment)
    assert (np.abs(made[0].astype(int) - levels[0]) <= 1).all()  # of float16
    np.testing.assert_array_equal(made[1], levels[1])


def test_each_picture_is_in_its_cell() -> None:
    wide = natural(1, 20, 40)[0]
    views: list[Pixels] = [
        np.full((1, 32, 32, 1), 50, np.uint8),
        np.full((1, 32, 32, 1), 200, np.uint8),
    ]
    sheet = np.asarray(contact_sheet([wide], {"torch": views}))
    cells = [sheet[TITLE + GAP :, GAP + k * (CELL + GAP) :][:CELL, :CELL] for k in range(3)]
    assert (cells[0][: CELL // 4] == 255).all() and (cells[0][CELL // 2] != 255).any()
    assert (cells[1] == 50).all() and (cells[2] == 200).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits_simsam"], "did you mean digits_simsiam"),
        (["zebra"], "train.py --help"),
        (["digits_simsiam", "--images", "1"], "--images 1: give 2 or more"),
        (["digits_simsiam", "--images", "2000"], "2000 is more than the 1400"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        preview(parse(words))


def test_a_sheet_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    words = ["digits_simsiam", "--images", "2", "--out", str(tmp_path / "none" / "sheet.png")]
    with pytest.raises(CannotCreate, match=r"--out .*sheet\.png cannot be written"):
        preview(parse(words))


def test_the_command_ends_with_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["zebra"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown recipe zebra")


def test_it_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rdm_fast.tools.preview", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--data.root" in done.stdout and "--out" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--imagess 3", "--imagess, 3: did you mean --images?"),
        ("--images three", "--images: invalid literal for int() with base 10: 'three' (--help"),
        ("--augment.size", "'--augment.size'. Expected 1 values (--help lists all)"),
        ("--data.name cifar", "invalid choice 'cifar' for argument '--data.name'. Expected one of"),
        ("--augment.size 2", "augment.size=2: a view has at least 8 pixels a side"),
        ("a value", "Unrecognized options: a, value"),
    ],
)
def test_a_bad_flag_is_one_sentence(
    words: str, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["digits_simsiam", *words.split()])
    out, err = capfd.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and told in err
