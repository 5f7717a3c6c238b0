"""rdm_fast.training.collapse: its warnings, its remedies, and a run that collapses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rdm_fast.config import Config, FilterConfig, GuardConfig
from rdm_fast.config.recipes import RECIPES
from rdm_fast.errors import Collapsed
from rdm_fast.run import checkpoint
from rdm_fast.tools.sweep.grid import configure
from rdm_fast.training.collapse import CollapseGuard, remedy
from rdm_fast.training.trainer import Trainer
from tests.runs import final_state, metrics, newest, run, with_log
from tests.tiny import tiny

# Measured: effective rank of the projections after 1, 2, 3, 5, 10, 20 and 30 epochs of a recipe
# shortened to 30 (seed 0), and the lowest std of these moments
HEALTHY = {
    "digits_rdm_simsiam": ([51.34, 43.20, 30.71, 18.80, 19.45, 31.47, 35.17], 0.998),
    "digits_simsiam": ([50.34, 43.67, 25.23, 10.36, 6.87, 7.68, 7.66], 0.985),
    "digits_rdm_byol": ([36.71, 14.27, 8.07, 6.78, 7.23, 8.95, 9.64], 0.989),
    "digits_byol": ([45.14, 17.65, 11.17, 7.78, 6.11, 5.84, 6.16], 0.989),
}
COLLAPSED = {
    "digits_rdm_simsiam": ([44.26, 14.19, 5.61, 2.30, 1.85, 1.87, 1.86], 0.862),  # sigma=0
    "digits_symsimsiam": ([37.62, 7.13, 2.79, 1.81, 1.78, 1.85, 1.85], 0.844),
}


def line(rank: float, std: float = 1.0, attainable: float = 199) -> dict[str, float]:
    return {
        "effective_rank/projection": rank, "effective_rank/share": rank / attainable, "std": std,
    }  # fmt: skip


def said(guard: CollapseGuard, *lines: dict[str, float]) -> list[str | None]:
    return [guard.check(step, each) for step, each in enumerate(lines, start=1)]


def guarded(**settings: Any) -> CollapseGuard:
    config = replace(RECIPES["digits_rdm_simsiam"](), guard=GuardConfig(**settings))
    return CollapseGuard(config, total_steps=100)


# ---- when it warns ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_recipes_give_no_warning(name: str) -> None:
    ranks, std = HEALTHY[name]
    guard = CollapseGuard(RECIPES[name](), total_steps=1)
    assert said(guard, *(line(rank, std) for rank in ranks)) == [None] * len(ranks)


@pytest.mark.parametrize("name", COLLAPSED)
def test_collapsing_runs_give_one_warning_after_three_lines(name: str) -> None:
    ranks, std = COLLAPSED[name]
    guard = CollapseGuard(RECIPES[name](), total_steps=1)
    spoken = said(guard, *(line(rank, std) for rank in ranks))
    first = next(i for i, rank in enumerate(ranks) if rank < 3)
    assert [text is not None for text in spoken] == [i == first + 2 for i in range(len(ranks))]
    assert f"step {first + 3}," in str(spoken[first + 2])


def test_there_is_no_warning_while_warming_up() -> None:
    guard = guarded(warmup=0.04, patience=2)  # 4 of 100 steps
    spoken = said(guard, *[line(1.0)] * 8)
    assert [text is not None for text in spoken] == [False] * 5 + [True] + [False] * 2


def test_a_good_line_resets_the_count_and_a_second_collapse_warns_again() -> None:
    low, good = line(1.5), line(20.0)
    spoken = said(guarded(warmup=0.0), low, low, good, low, low, low, low, good, low, low, low)
    assert [i for i, text in enumerate(spoken) if text] == [5, 10]


def test_rows_that_are_all_alike_are_found_by_their_std() -> None:
    spoken = said(guarded(warmup=0.0, patience=1), line(50.0, std=0.05))
    assert "guard.min_std=0.1" in str(spoken[0])
    zeros = {"effective_rank/projection": 0.0, "effective_rank/share": 0.0, "std": 1.0}
    assert said(guarded(warmup=0.0, patience=1, min_std=0.0), zeros)[0] is not None


def test_the_bound_is_at_most_a_tenth_of_what_the_batch_can_show() -> None:
    """Two directions are few of 199, but not of eight."""
    guard = {"warmup": 0.0, "patience": 1}
    assert said(guarded(**guard), line(2.0))[0] is not None
    assert said(guarded(**guard), line(2.0, attainable=8)) == [None]
    assert said(guarded(**guard, min_rank=1.5), line(2.0)) == [None]


def test_values_that_are_not_finite_are_ignored() -> None:
    nan = float("nan")
    assert said(guarded(warmup=0.0, patience=1), line(nan, nan)) == [None]


def test_off_never_warns_and_stop_warns_of_every_later_line() -> None:
    lines = [line(1.0)] * 4
    assert said(guarded(mode="off", warmup=0.0), *lines) == [None] * 4
    spoken = said(guarded(mode="stop", warmup=0.0, patience=2), *lines)
    assert [text is not None for text in spoken] == [False, True, True, True]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, False),
        ({"perplexity/target": 2.9}, True),
        ({"entropy/target": 0.985}, True),
        ({"loss": 6.245}, True),  # ln 512 = 6.238
        ({"loss": 6.20}, False),
    ],
)
@pytest.mark.parametrize("name", ["digits_dino", "digits_swav"])
def test_targets_of_one_prototype_and_uniform_ones_are_found(
    name: str, changed: dict[str, float], expected: bool
) -> None:
    config = RECIPES[name]()
    assert config.prototypes.count == 512
    config = replace(config, guard=GuardConfig(warmup=0.0, patience=2))
    healthy = line(20.0) | {"perplexity/target": 40.0, "entropy/target": 0.3, "loss": 3.0}
    spoken = said(CollapseGuard(config, total_steps=100), healthy, *[healthy | changed] * 2)
    assert spoken[:2] == [None, None] and (spoken[2] is not None) == expected
    if expected:
        flag = "teacher-temp" if name == "digits_dino" else "epsilon"
        assert str(spoken[2]).startswith("the targets") and flag in str(spoken[2])


# ---- remedies --------------------------------------------------------------------------------


def advised(name: str, **filter: Any) -> str:
    config = RECIPES[name]()
    return remedy(replace(config, filter=replace(config.filter, **filter)) if filter else config)


def test_the_advice_fits_the_configuration() -> None:
    assert "control" in advised("digits_symsimsiam")
    assert "sigma=0 filters nothing" in advised("digits_rdm_simsiam", sigma=0.0)
    assert "a rising g, lowers" in advised("digits_rdm_simsiam", sigma=1.0)
    assert "keep the ranks apart" in advised("digits_rdm_byol", sigma=0.1)
    assert "base-lr" in advised("digits_simsiam") and "preview" in advised("digits_byol")
    assert "teacher-temp" in advised("digits_dino") and "epsilon" in advised("digits_swav")
    dino = RECIPES["digits_dino"]()
    for changed, named in (({"centring": "none"}, "sinkhorn"), ({"teacher_temp": 0.1}, "sharper")):
        text = remedy(replace(dino, prototypes=replace(dino.prototypes, **changed)))
        assert named in text
    assert "sigma=0 filters nothing" in remedy(configure(dino, "control"))
    assert "keep the ranks apart" in remedy(configure(dino, "online_log_1"))
    byol = RECIPES["digits_byol"]()
    assert "ema-start" in remedy(replace(byol, optim=replace(byol.optim, ema_start=0.0)))


@pytest.mark.parametrize("name", RECIPES)
def test_every_advice_is_the_end_of_one_sentence(name: str) -> None:
    text = remedy(RECIPES[name]())
    assert not text.endswith(".") and "\n" not in text and text[0].islower()


# ---- a run that collapses --------------------------------------------------------------------


def collapsing(mode: str) -> Config:
    """Without filter and predictor nothing keeps the branches' ranks apart; eight epochs do."""
    config = with_log(tiny(epochs=6, global_batch=200, base_lr=0.5), every=7, save_every=1000)
    return replace(
        config, filter=FilterConfig(sigma=0.0), guard=GuardConfig(mode=mode)  # type: ignore[arg-type]
    )  # fmt: skip


def warnings(path: Path) -> list[tuple[int, str]]:
    return [(each["step"], each["warning"]) for each in metrics(path) if "warning" in each]


def test_a_collapsing_run_warns_or_stops_and_continues_where_it_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "warned", collapsing("warn"))
    ((step, text),) = warnings(tmp_path / "warned")
    assert f"warning: {text}" in capsys.readouterr().out.splitlines()
    assert step < 56 and "filter.sigma=0 filters nothing" in text

    for _ in range(2):  # resumed as it is, it stops again, at the next line
        with pytest.raises(Collapsed) as stopped:
            run(tmp_path / "stopped", collapsing("stop"))
        assert stopped.value.code == 71
        assert checkpoint.load(newest(tmp_path / "stopped")).step == step
        step += 7
    run(tmp_path / "stopped", collapsing("warn"))
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "warned")


@pytest.mark.parametrize(
    "changed", [{"centring": "none", "teacher_temp": 0.1}, {"teacher_temp": 1.0}]
)
def test_dino_without_its_parts_is_found_collapsed(changed: dict[str, Any], tmp_path: Path) -> None:
    """Neither center nor sharper targets; and a center alone, which makes the targets uniform."""
    config = with_log(tiny("digits_dino", epochs=6, global_batch=200), every=7, save_every=1000)
    settings = {"teacher_temp_start": changed["teacher_temp"], **changed}
    how = replace(config.prototypes, **settings)
    run(tmp_path, replace(config, prototypes=how, guard=GuardConfig(warmup=0.0)))
    assert [text for _, text in warnings(tmp_path) if "prototypes." in text]


def test_a_healthy_run_ends_without_a_warning(tmp_path: Path) -> None:
    trainers: list[Trainer] = []
    run(tmp_path / "run", tiny(epochs=4, base_lr=0.5), trainers.append)
    assert warnings(tmp_path / "run") == [] and trainers[0].collapse_guard.low == 0
