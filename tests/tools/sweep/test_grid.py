"""Names of filters against the paper's grid, and predictions against the trainer's own advice."""

from dataclasses import replace

import pytest

from rdm_fast.cli.commands import COMMANDS
from rdm_fast.config import Config, FilterConfig
from rdm_fast.config.recipes import RECIPES, recipe
from rdm_fast.errors import UsageError
from rdm_fast.filters.response import advice
from rdm_fast.tools.sweep.grid import GRID, configure, prediction
from tests.spies import refused
from tests.tiny import tiny

PAPER = {
    "online": {("poly", 1.0), ("poly", 2.0), ("log", 1.0), ("log_1", 1.0), ("log_2", 1.0)},
    "target": {("poly", -1.0), ("poly", -0.7), ("poly", -0.5), ("poly", -0.3)},
}
"""The CIFAR-10 filters of arXiv:2303.02387."""


def swept(*args: str) -> dict[str, Config]:
    runs: dict[str, Config] = COMMANDS["sweep"].parse(args).runs
    return runs


def test_the_default_is_the_papers_grid_and_a_control() -> None:
    runs = swept()
    assert tuple(runs) == GRID and len(runs) == 10
    filters = [config.filter for name, config in runs.items() if name != "control"]
    found = {
        location: {(f.kind, f.sigma) for f in filters if f.location == location}
        for location in PAPER
    }
    assert found == PAPER
    assert (runs["control"].filter.kind, runs["control"].filter.sigma) == ("poly", 0.0)


@pytest.mark.parametrize("name", [name for name in RECIPES if recipe(name).predictor != "none"])
def test_runs_differ_in_filter_and_folder_and_in_nothing_else(name: str) -> None:
    runs = swept(name, "--optim.epochs", "50")
    assert len(runs) == len(GRID)
    for filter_name, config in runs.items():
        assert config.out == f"runs/sweep_{name}/{filter_name}"
        assert config.predictor == "spectral"
        base = recipe(name)
        expected = replace(base, optim=replace(base.optim, epochs=50), predictor="spectral")
        assert replace(config, filter=base.filter, out=base.out) == expected


@pytest.mark.parametrize("name", ["digits_dino", "digits_swav", "cifar10_swav", "imagenet_dino"])
def test_a_filter_takes_the_place_of_center_sharper_targets_and_sinkhorn(name: str) -> None:
    base = recipe(name)
    for filter_name, config in swept(name).items():
        how = config.prototypes
        assert config.predictor == "spectral" and how.centring == "none" and how.queue == 0
        cold = how.epsilon if config.method == "swav" else how.teacher_temp
        assert cold == how.teacher_temp_start or config.method == "swav"
        assert cold == how.temperature == base.prototypes.temperature
        assert prediction(config) == ("zero" if filter_name == "control" else "positive")
    assert prediction(base) == "positive"


def test_other_settings_of_the_filter_reach_the_runs_that_can_have_them() -> None:
    line = "--filter.cutoff 0.01 --filter.basis online --filter online_s1 target_s-1"
    runs = swept(*line.split())
    assert {config.filter.cutoff for config in runs.values()} == {0.01}
    assert [config.filter.basis for config in runs.values()] == ["own", "online"]


def test_any_exponent_and_the_symmetric_control_can_be_named() -> None:
    config = configure(tiny(), "online_s0.25")
    assert config.filter == FilterConfig(location="online", kind="poly", sigma=0.25)
    (config,) = swept("--filter", "symsimsiam").values()
    assert (config.method, config.predictor) == ("symsimsiam", "none")


@pytest.mark.parametrize("name", [*GRID, "online_s-1", "target_s1", "target_log", "online_s0"])
def test_a_prediction_is_negative_exactly_where_the_trainer_warns(name: str) -> None:
    config = configure(tiny(), name)
    assert (prediction(config) == "negative") == (advice(config.filter) is not None)
    assert (prediction(config) == "zero") == (config.filter.sigma == 0)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--filter online_q", "--filter online_q"),
        ("--filter online_s", "--filter online_s"),
        ("--filter online_log_3", "--filter online_log_3"),
        ("--filter control control", "control twice"),
        ("--filter", "--filter"),
        ("--jobs -1", "--jobs=-1"),
        ("digits_symsimsiam", "method=symsimsiam"),
        ("digits_dino --optim.accumulate 2", "optim.accumulate=2"),
    ],
)
def test_a_sweep_that_cannot_run_is_named(line: str, named: str) -> None:
    with refused(UsageError, named):
        swept(*line.split())
