"""`rdm doctor` in staged situations: it names the part that was made slow, and writes nothing else.

The parts are slow by work that cannot be hidden, and by a factor of ten or more.
"""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rdm_fast.cli import commands as cli
from rdm_fast.config import Config
from rdm_fast.data import build_loader, load
from rdm_fast.errors import UsageError
from rdm_fast.methods import build_method
from rdm_fast.tools.doctor import stages
from rdm_fast.tools.doctor.diagnosis import diagnose
from rdm_fast.tools.doctor.stages import LIMIT_S, Clock, Step, without_filter
from tests.data.loaders.dali_here import needs_dali
from tests.tiny import METHODS, batch, tiny, with_small_views

CPU = torch.device("cpu")
LARGE = 1500  # pixels a side of a file whose view has 16: 0.1 s to decode, a step takes 0.02 s
TINY = [
    *("--model.width", "4", "--model.projector-hidden", "16", "--model.projector-dim", "24"),
    *("--optim.global-batch", "64", "--batches", "1"),
]


def report(config: Config, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "report.json"
    diagnose(config, CPU, batches=2, path=path)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def folder_of_large_images(root: Path, n: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (LARGE, LARGE), np.uint8)
    first = root / "train" / "a" / "0.png"
    first.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(first, compress_level=1)
    for i in range(1, n):
        shutil.copy(first, first.with_name(f"{i}.png"))
    return root


def test_a_slow_source_is_named(tmp_path: Path) -> None:
    config = tiny(global_batch=4)
    root = folder_of_large_images(tmp_path / "images", 8)
    data = replace(config.data, name="folder", root=str(root), loader="torch", workers=0)
    augment = replace(config.augment, mean=(0.3,) * 3, std=(0.3,) * 3)
    found = report(replace(config, data=data, augment=augment), tmp_path)
    assert found["bottleneck"] == "loader"
    assert any(line.startswith("--data.workers") for line in found["advice"])
    assert found["stages"]["decode"]["seconds"] > 0


def test_a_slow_filter_is_named(tmp_path: Path) -> None:
    config = tiny(global_batch=256)
    slow = replace(
        config,
        filter=replace(config.filter, engine="reference"),
        model=replace(config.model, projector_dim=1024, projector_hidden=8),
        augment=replace(config.augment, size=8),
    )
    found = report(slow, tmp_path)
    assert found["bottleneck"] == "filter"
    assert found["advice"][0].startswith("--filter.engine auto")


@needs_dali
def test_what_is_left_of_a_view_after_dali_is_timed(tmp_path: Path) -> None:
    config = with_small_views("digits_byol", global_batch=64)
    found = report(replace(config, data=replace(config.data, loader="dali")), tmp_path)
    stage = found["stages"]["augmentation"]
    assert stage["seconds"] > 0 and stage["note"] == "colors; crops are made in DALI"
    assert found["stages"]["decode"]["note"] == "inside DALI"


# ---- what is measured --------------------------------------------------------------------------


def test_every_stage_of_a_step_is_told_with_or_without_numbers(tmp_path: Path) -> None:
    found = report(tiny("digits_byol", global_batch=64), tmp_path)
    assert [*found["stages"]] == [
        "loader", "transfer", "decode", "augmentation", "model", "filter", "end to end",
    ]  # fmt: skip
    absent = {name for name, stage in found["stages"].items() if stage["seconds"] is None}
    assert absent == {"transfer", "decode", "filter"}
    assert all(found["stages"][name]["note"] for name in absent)
    for stage in found["stages"].values():
        if stage["seconds"] is not None:
            assert stage["images_per_s"] == pytest.approx(64 / stage["seconds"])
            assert 1 <= stage["batches"] <= 2


def test_batches_of_parallel_workers_are_measured_in_whole_bursts() -> None:
    config = tiny(global_batch=100)
    config = replace(config, data=replace(config.data, loader="torch", workers=2))
    images = load(config.data, "train")
    loader = build_loader(config, images, rank=0, world_size=1, device=CPU)
    step = Step(config, images, loader, CPU, batches=3)
    assert step.loading().batches == 4


class Hands:
    """A clock that only moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("seconds", "burst", "expected"),
    [(0.5, 1, 8), (0.5, 3, 9), (LIMIT_S / 4, 1, 4), (LIMIT_S / 4, 3, 6), (10 * LIMIT_S, 1, 1)],
)
def test_a_stage_takes_so_many_batches_or_so_long(
    seconds: float, burst: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hands = Hands(monkeypatch)
    clock = Clock(CPU, batches=8)
    stage = clock.time("x", lambda: hands.pass_by(seconds), 32, warm_up=1, burst=burst)
    assert stage.batches == expected
    assert stage.seconds == pytest.approx(seconds)
    assert stage.images_per_s == pytest.approx(32 / seconds)


@pytest.mark.parametrize("n_views", [2, 5])
def test_what_is_done_image_by_image_is_told_for_a_whole_batch(
    n_views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_small_views("digits_byol", n_views - 2, global_batch=64)
    config = replace(config, data=replace(config.data, loader="torch", workers=0))
    images = load(config.data, "train")
    loader = build_loader(config, images, rank=0, world_size=1, device=CPU)
    step = Step(config, images, loader, CPU, batches=3)
    hands = Hands(monkeypatch)
    monkeypatch.setattr(stages, "view_of_image", lambda *_: hands.pass_by(0.25))
    stage = step.augmentation()
    assert stage.seconds == pytest.approx(64 * n_views * 0.25)
    assert stage.images_per_s == pytest.approx(4 / n_views)


def test_small_views_are_a_part_of_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_small_views("digits_byol", 3, global_batch=64)
    images = load(config.data, "train")
    loader = build_loader(config, images, rank=0, world_size=1, device=CPU)
    made: list[int] = []
    real = stages.views_of_table

    def counted(*given: Any) -> Tensor:
        made.append(len(views := real(*given)))
        return views

    monkeypatch.setattr(stages, "views_of_table", counted)
    Step(config, images, loader, CPU, batches=1).augmentation()
    assert made == [2 * 64, 3 * 64] * 3  # two to warm up


@pytest.mark.parametrize("name", METHODS)
def test_the_model_without_its_filter_is_the_same_but_for_the_criterion(name: str) -> None:
    config = tiny(name, global_batch=16)
    torch.manual_seed(0)
    whole = build_method(config)
    torch.manual_seed(0)
    plain = without_filter(config)
    assert plain.criterion.filter is None
    views = batch(16)
    ours, theirs = (method(views.view1, views.view2) for method in (plain, whole))
    for field in ("online", "target"):
        assert torch.equal(getattr(ours.branches, field), getattr(theirs.branches, field))
    assert torch.equal(ours.loss, theirs.loss) == (whole.criterion.filter is None)


# ---- the command -------------------------------------------------------------------------------


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *words])
    return int(ended.value.code or 0)


def test_without_a_terminal_it_prints_plain_lines_and_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("digits_rdm_simsiam", *TINY) == 0
    printed = capsys.readouterr().out
    assert printed.isascii() and "\x1b" not in printed
    assert torch.__version__ in printed
    assert "\nbottleneck: " in printed and "\ntry " in printed
    assert not [*tmp_path.iterdir()], "it writes nothing that it was not asked for"


def test_mistakes_are_one_sentence_and_leave_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--json", "nowhere/report.json") == 73
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --json nowhere/report.json: there is no folder")
    assert captured.out == "" and captured.err.count("\n") == 1
    assert run("--batches", "0") == 2
    assert "batches=0: give 1 or more" in capsys.readouterr().err
    assert run("digits_rdm_simsam") == 2
    assert "did you mean digits_rdm_simsiam?" in capsys.readouterr().err
    assert run("cifar10_simsiam", "--data.root", str(tmp_path)) == 66
    assert "torch " in capsys.readouterr().out  # the machine is told all the same


def test_a_batch_that_does_not_fit_is_told_with_the_way_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Step) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Step, "stages", full)
    assert run("digits_byol") == 2
    message = capsys.readouterr().err
    assert "--optim.global-batch 200 does not fit" in message and "--optim.accumulate 2" in message


def test_it_takes_the_flags_of_train_and_refuses_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    command = cli.COMMANDS["doctor"].parse(["digits_byol", "--batch-size", "50", "--batches", "3"])
    assert command.config.optim.global_batch == 50 and command.batches == 3
    assert command.config.method == "byol"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without torchrun"):
        cli.COMMANDS["doctor"].parse([])
