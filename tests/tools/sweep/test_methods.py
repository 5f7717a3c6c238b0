"""rdm_fast.tools.sweep.methods: what `rdm sweep digits_methods` runs and draws."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from rdm_fast.cli.commands import COMMANDS
from rdm_fast.config import Config
from rdm_fast.config.recipes import RECIPES
from rdm_fast.errors import UsageError
from rdm_fast.tools.report import style
from rdm_fast.tools.report.read import Run, read_run
from rdm_fast.tools.sweep.comparison import COLUMNS, compare
from rdm_fast.tools.sweep.grid import prediction
from rdm_fast.tools.sweep.methods import METHODS, SWEEPS
from tests.spies import refused
from tests.tools.report.made import make_run, spectrum_line


def swept(*args: str) -> dict[str, Config]:
    runs: dict[str, Config] = COMMANDS["sweep"].parse(args).runs
    return runs


@pytest.mark.parametrize("name", SWEEPS)
def test_the_runs_are_the_recipes(name: str) -> None:
    runs, family = swept(name), name.removesuffix("_methods")
    assert tuple(runs) == METHODS
    for method in ("simsiam", "byol", "swav", "dino", "symsimsiam"):
        config = RECIPES[f"{family}_{method}"]()
        assert runs[method] == replace(config, out=f"runs/sweep_{name}/{method}")


def test_every_ablation_changes_one_part() -> None:
    runs = swept("cifar10_methods")
    dino, swav = runs["dino"], runs["swav"]

    def changed(name: str, config: Config, **prototypes: object) -> None:
        settings = replace(config.prototypes, **prototypes)  # type: ignore[arg-type]
        assert runs[name] == replace(config, prototypes=settings, out=runs[name].out)

    changed("dino_without_centring", dino, centring="none")
    flat = {"teacher_temp_start": 0.1, "teacher_temp": 0.1, "teacher_temp_epochs": 0.0}
    changed("dino_without_sharpening", dino, **flat)
    assert swav.prototypes.queue
    changed("swav_without_sinkhorn", swav, centring="none", queue=0, queue_epoch=0.0)
    control, simsiam = runs["control"], runs["simsiam"]
    assert (control.predictor, control.filter.sigma) == ("spectral", 0.0)
    predictor = {"predictor": simsiam.predictor, "filter": simsiam.filter, "out": simsiam.out}
    assert replace(control, **predictor) == simsiam  # type: ignore[arg-type]
    found = {name: prediction(config) for name, config in runs.items()}
    assert {name for name in found if found[name] == "zero"} == {"control", "symsimsiam"}


def test_flags_reach_every_run_and_leave_the_rest_to_its_recipe() -> None:
    flags = ["--seed", "3", "--optim.epochs", "50", "--optim.weight-decay", "0.01"]
    plain, runs = swept("digits_methods"), swept("digits_methods", *flags)
    for name, config in runs.items():
        optim = replace(plain[name].optim, epochs=50, weight_decay=0.01)
        assert config == replace(plain[name], seed=3, optim=optim)
    assert runs["dino"].optim.optimizer == "adamw" and runs["swav"].optim.optimizer == "sgd"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("digits_method", "digits_methods"),
        ("digits_methods --methods din", "--methods din"),
        ("digits_methods --methods dino dino", "dino twice"),
        ("digits_methods --methods", "--methods"),
        ("digits_methods --filter control", "--filter"),
        ("digits_byol --methods dino", "--methods"),
        ("digits_vit_methods", "digits_vit_methods"),
    ],
)
def test_a_sweep_that_cannot_run_is_named(line: str, named: str) -> None:
    with refused(UsageError, named):
        swept(*line.split())


def made(folder: Path, name: str, *, spectra: bool) -> Run:
    path = make_run(folder / name)
    if spectra:
        (path / "spectrum.jsonl").write_text(spectrum_line(4) + spectrum_line(8))
    return read_run(path, name)


def test_the_figure_has_a_panel_of_ranks_for_each_run_and_one_of_each_response(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style, "DPI", 50)
    runs = [made(tmp_path, f"run {i}", spectra=i != 2) for i in range(COLUMNS + 1)]
    with style.applied():
        pictures = [compare(runs), compare(runs[:1]), compare(runs[2:3])]
        assert compare([read_run(make_run(tmp_path / "empty", lines=[]), "empty")]) is None
    heights = [struct.unpack(">I", p.png[20:24])[0] for p in pictures if p is not None]
    rows = [3, 2, 1]  # two of ranks and one of five responses; one of each; no response
    assert heights == [pytest.approx(50 * (2.1 * n + 0.4), abs=1) for n in rows]
    assert pictures[0] is not None and pictures[0].alt.count("run") == COLUMNS + 1
