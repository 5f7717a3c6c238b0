"""`rdm doctor` names the part of a step that was made slow, times every stage, and writes no more.

Parts are slowed by work that cannot be hidden, by a factor of ten or more.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_fast.config import Config
from rdm_fast.data import build_loader, load
from rdm_fast.methods import build_method
from rdm_fast.tools.doctor import stages
from rdm_fast.tools.doctor.diagnosis import diagnose
from rdm_fast.tools.doctor.stages import LIMIT_S, StageTimer, StepParts, without_filter
from tests.data.loaders.dali_here import needs_dali
from tests.runs import CPU, rdm
from tests.tiny import METHODS, batch, tiny, with_small_views

LARGE = 1500  # side in pixels of a file whose view has 16: 0.1 s to decode, where a step takes 0.02
TINY = (
    "doctor digits_rdm_simsiam --model.width 4 --model.projector-hidden 16 "
    "--model.projector-dim 24 --optim.global-batch 64 --batches 1"
)


def with_data(config: Config, **data: Any) -> Config:
    return replace(config, data=replace(config.data, **data))


def report(config: Config, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "report.json"
    diagnose(config, CPU, batches=2, path=path)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def parts(config: Config, batches: int = 3) -> StepParts:
    images = load(config.data, "train")
    loader = build_loader(config, images, rank=0, world_size=1, device=CPU)
    return StepParts(config, images, loader, CPU, batches=batches)


# ---- verdicts --------------------------------------------------------------------------------


def test_a_slow_source_is_named(tmp_path: Path) -> None:
    first = tmp_path / "images/train/a/0.png"
    first.parent.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (LARGE, LARGE), np.uint8)
    Image.fromarray(pixels).save(first, compress_level=1)
    for i in range(1, 8):
        shutil.copy(first, first.with_name(f"{i}.png"))
    config = with_data(
        tiny(global_batch=4), name="folder", root=str(tmp_path / "images"), loader="torch",
        workers=0,
    )  # fmt: skip
    augment = replace(config.augment, mean=(0.3,) * 3, std=(0.3,) * 3)
    found = report(replace(config, augment=augment), tmp_path)
    assert found["bottleneck"] == "loader"
    assert any(line.startswith("--data.workers") for line in found["advice"])
    assert found["stages"]["decode"]["seconds"] > 0


def test_a_slow_filter_is_named(tmp_path: Path) -> None:
    config = tiny(global_batch=256)
    slow = replace(
        config,
        filter=replace(config.filter, engine="reference"),
        model=replace(config.model, projector_dim=2048, projector_hidden=8),
        augment=replace(config.augment, size=8),
    )
    found = report(slow, tmp_path)
    assert found["bottleneck"] == "filter"
    assert found["advice"][0].startswith("--filter.engine auto")


# ---- stages ----------------------------------------------------------------------------------


def test_every_stage_is_listed_with_or_without_numbers(tmp_path: Path) -> None:
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


@needs_dali
def test_augmentation_after_dali_is_timed(tmp_path: Path) -> None:
    config = with_small_views("digits_byol", global_batch=64)
    found = report(with_data(config, loader="dali"), tmp_path)
    assert found["stages"]["augmentation"]["seconds"] > 0
    assert "DALI" in found["stages"]["augmentation"]["note"]
    assert "DALI" in found["stages"]["decode"]["note"]


def test_batches_of_parallel_workers_are_measured_in_whole_bursts() -> None:
    config, used = with_data(tiny(global_batch=100), loader="torch", workers=2), []
    assert parts(config).from_loader("x", used.append, warm_up=1).batches == 4
    assert len(used) == 2 + 4  # a burst to warm up


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves time.perf_counter on, which stands still otherwise."""
    waited = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: sum(waited))
    return waited.append


@pytest.mark.parametrize(
    ("seconds", "burst", "expected"),
    [(0.5, 1, 8), (0.5, 3, 9), (LIMIT_S / 4, 1, 4), (LIMIT_S / 4, 3, 6), (10 * LIMIT_S, 1, 1)],
)
def test_a_stage_measures_a_number_of_batches_or_for_a_time(
    seconds: float, burst: int, expected: int, wait: Callable[[float], None]
) -> None:
    timer = StageTimer(CPU, batches=8)
    stage = timer.time("x", lambda: wait(seconds), 32, warm_up=1, burst=burst)
    assert stage.batches == expected
    assert stage.seconds == pytest.approx(seconds)
    assert stage.images_per_s == pytest.approx(32 / seconds)


@pytest.mark.parametrize("n_views", [2, 5])
def test_single_images_are_scaled_to_a_batch(
    n_views: int, wait: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_small_views("digits_byol", n_views - 2, global_batch=64)
    step = parts(with_data(config, loader="torch", workers=0))
    monkeypatch.setattr(stages, "view_of_image", lambda *_: wait(0.25))
    stage = step.augmentation()
    assert stage.seconds == pytest.approx(64 * n_views * 0.25)
    assert stage.images_per_s == pytest.approx(4 / n_views)


def test_augmentation_includes_small_views(monkeypatch: pytest.MonkeyPatch) -> None:
    step = parts(with_small_views("digits_byol", 3, global_batch=64), batches=1)
    made: list[int] = []
    real = stages.views_of_table
    monkeypatch.setattr(stages, "views_of_table", lambda *given: made.append(len(real(*given))))
    step.augmentation()
    assert made == [2 * 64, 3 * 64] * 3  # two to warm up


@pytest.mark.parametrize("name", METHODS)
def test_the_model_without_its_filter_differs_in_the_criterion_only(name: str) -> None:
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


# ---- the command -----------------------------------------------------------------------------


def test_without_a_terminal_it_prints_plain_lines_and_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rdm(TINY) == 0
    printed = capsys.readouterr().out
    assert printed.isascii() and "\x1b" not in printed
    assert torch.__version__ in printed
    assert "\nbottleneck: " in printed and "\ntry " in printed
    assert not [*tmp_path.iterdir()], "it writes only what --json asks for"


def test_mistakes_are_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rdm("doctor --json nowhere/report.json") == 73
    out, err = capsys.readouterr()
    assert "--json nowhere/report.json" in err and err.count("\n") == 1 and out == ""
    assert rdm("doctor cifar10_simsiam --data.root", tmp_path) == 66
    assert "torch " in capsys.readouterr().out  # the machine is shown all the same

    def full(_: StepParts) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StepParts, "stages", full)
    assert rdm("doctor digits_byol") == 2
    err = capsys.readouterr().err
    assert "--optim.global-batch 200" in err and "--optim.accumulate 2" in err
