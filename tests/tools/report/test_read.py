"""rdm_fast.tools.report.read: the contents of a run folder, even if much of it is gone."""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rdm_fast.config import FilterConfig
from rdm_fast.config.recipes import RECIPES
from rdm_fast.errors import InputMissing
from rdm_fast.telemetry import KEYS
from rdm_fast.tools.report.read import (
    Run,
    Series,
    describe,
    describe_filter,
    differences,
    find_runs,
    labels,
    read_run,
    read_runs,
)
from tests.tiny import tiny
from tests.tools.report.made import evaluate, line, make_run


@pytest.fixture
def sound(tmp_path: Path) -> Run:
    return read_run(make_run(tmp_path / "run"), "run")


def test_a_sound_run_is_read_without_notes(sound: Run) -> None:
    assert sound.notes == []
    assert sound.state == "finished" and sound.environment["device"] == "an abacus"
    assert sound.config == replace(tiny(), out=str(sound.path))
    loss = sound.series("loss")
    assert loss.epochs == [0.5, 1.0, 1.5, 2.0]
    assert loss.values == pytest.approx([-0.2, -0.4, -0.6, -0.8])
    assert loss.last == loss.values[-1]
    # Lines without a metric are skipped.
    assert sound.series("knn_top1") == Series([0.0], [50.0])
    assert (
        sound.series("gpu_mem_gib") == Series([], []) and sound.series("gpu_mem_gib").last is None
    )
    assert {*line(1)} - {"step"} <= {*KEYS}  # that are logged


def test_a_value_that_was_not_finite_is_a_gap_and_not_the_last_value(tmp_path: Path) -> None:
    lines = [line(2), line(4, loss=None), line(6, loss="high"), line(8, loss=True)]
    loss = read_run(make_run(tmp_path / "run", lines=lines), "run").series("loss")
    assert loss.values[0] == pytest.approx(-0.2) and loss.last == loss.values[0]
    assert [math.isnan(value) for value in loss.values] == [False, True, True, True]


def test_the_time_is_that_of_all_intervals_at_their_own_speeds(tmp_path: Path) -> None:
    """336 images a step: 2 steps at 168 a second take 4 s, 6 steps at 672 take 3 s."""
    lines = [line(2, images_per_s=168.0), line(8, images_per_s=672.0)]
    run = read_run(make_run(tmp_path / "run", lines=lines), "run")
    assert run.seconds() == pytest.approx(7.0)
    assert run.median_speed() == pytest.approx(420.0)


# ---- damage ------------------------------------------------------------------------------------


def test_damaged_lines_are_counted_and_a_torn_last_one_is_only_skipped(sound: Run) -> None:
    path = sound.path / "metrics.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + b'{"step": 9, "los')
    run = read_run(sound.path, "run")
    assert run.notes == [] and run.series("loss").epochs[-1] == 2.0

    path.write_bytes(good.replace(b'{"step": 4,', b"\xff\x00", 1) + b"[1]\n{}\n" + b"[" * 9999)
    run = read_run(sound.path, "run")
    assert len(run.notes) == 1 and f"3 line(s) of {path}" in run.notes[0]
    assert run.series("loss").epochs == [0.5, 1.5, 2.0]


def test_a_run_without_files_has_notes_in_sentences(sound: Run) -> None:
    (sound.path / "config.yaml").write_text("{")
    run = read_run(sound.path, "run")
    assert run.config == sound.config  # from metrics.jsonl
    assert "config.yaml" in run.notes[0] and "metrics.jsonl" in run.notes[1]
    for name in ("config.yaml", "status.json", "metrics.jsonl"):
        (sound.path / name).unlink()
    run = read_run(sound.path, "run")
    assert len(run.notes) == 3
    assert all(note.endswith(".") and "\n" not in note for note in run.notes)
    assert run.state == "unknown" and run.title == "unknown configuration"
    assert run.settings == {} and run.seconds() is None and run.median_speed() is None


def test_an_unfinished_run_says_how_it_ended(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", state="failed", code=71, message="the loss was not finite")
    assert read_run(path, "run").notes == ["failed: the loss was not finite."]


def test_the_evaluation_is_the_newest_steps_and_of_these_the_last_saved(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    evaluate(path, 4, "logistic", top1=1.0)
    evaluate(path, 8, "logistic", top1=2.0)
    evaluate(path, 8, "closed-form", top1=3.0)
    os.utime(path / "evaluation" / "step-00000008-closed-form.json", (1, 1))
    assert read_run(path, "run").evaluation["top1"] == 2.0
    (path / "evaluation" / "step-00000008-logistic.json").write_text("{")
    run = read_run(path, "run")
    assert run.evaluation["top1"] == 3.0 and "logistic.json" in run.notes[0]


# ---- several runs ------------------------------------------------------------------------------


def test_a_folder_of_runs_stands_for_all_of_them_and_each_is_taken_once(tmp_path: Path) -> None:
    names = ["b", "a", "c"]
    for name in names:
        make_run(tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "sweep.md").touch()
    (tmp_path / "sweep" / "empty").mkdir()
    found = find_runs([str(tmp_path / "sweep" / "b"), str(tmp_path / "sweep")])
    assert [path.name for path in found] == ["b", "a", "c"]


def test_a_path_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "file", tmp_path / "empty"):
        with pytest.raises(InputMissing, match=str(path)):
            find_runs([str(path)])


def test_labels_are_the_shortest_that_distinguish_runs() -> None:
    assert labels([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert labels([Path("/x/s/a"), Path("/x/t/a"), Path("/x/t/b")]) == ["s/a", "t/a", "b"]
    assert labels([Path("/x/a"), Path("/y/x/a")]) == ["/x/a", "y/x/a"]


def test_differences_are_the_settings_that_differ_but_for_the_folder(tmp_path: Path) -> None:
    config = tiny()
    other = replace(config, seed=7, filter=replace(config.filter, sigma=-0.5))
    paths = [make_run(tmp_path / "a", config), make_run(tmp_path / "b", other)]
    assert differences(read_runs(paths)) == {"filter.sigma": [-1.0, -0.5], "seed": [0, 7]}

    broken = make_run(tmp_path / "c")
    (broken / "config.yaml").unlink()
    (broken / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    assert differences(read_runs([*paths, broken]))["seed"] == [0, 7, None]


def test_recipes_and_filters_have_distinct_descriptions() -> None:
    names = [name for name in RECIPES if re.fullmatch("digits_(?!vit_).*", name)]
    texts = {describe(RECIPES[name]()) for name in names}
    assert len(texts) == len(names)
    assert "SimSiam, target s^-1" in texts and "BYOL, learned predictor" in texts
    assert describe_filter(FilterConfig(kind="log_2")) == "online log(1 + s^2)"
    assert describe_filter(FilterConfig(location="target", sigma=-0.5)) == "target s^-0.5"
    assert describe_filter(FilterConfig(sigma=0)) == "no filter"
