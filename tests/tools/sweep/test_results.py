"""rdm_fast.tools.sweep.results: every number of the table comes from the run it is named after."""

import struct
from pathlib import Path

from rdm_fast.tools.report import style
from rdm_fast.tools.report.read import Run, read_run
from rdm_fast.tools.sweep.grid import GRID, configure
from rdm_fast.tools.sweep.queue import Failure
from rdm_fast.tools.sweep.results import Row, conditions, figure, markdown, row
from tests.tiny import tiny
from tests.tools.report.made import evaluate, line, make_run


def swept(tmp_path: Path) -> dict[str, Run]:
    """The grid, every run with metrics of its own; the last is without any."""
    runs = {}
    for i, name in enumerate(GRID):
        lines = [line(step, rank_difference=10 * i + step - 3.0) for step in (4, 2, 8)]
        path = make_run(tmp_path / name, configure(tiny(), name), lines if i < 9 else [])
        if i < 9:
            evaluate(path, top1=90.0 + i)
        runs[name] = read_run(path, name)
    return runs


def rows(runs: dict[str, Run]) -> list[Row]:
    failures = {"control": Failure(71, "it stopped")}
    return [row(run, name, failures.get(name)) for name, run in runs.items()]


def test_a_row_has_the_last_values_and_the_lowest_rank_difference(tmp_path: Path) -> None:
    found = rows(swept(tmp_path))[2]
    assert (found.name, found.filter, found.predicted) == ("online_log", "online log s", "positive")
    assert (found.probe_top1, found.knn_top1, found.protocol) == (92.0, 88.0, "logistic")
    assert found.effective_rank == {"online": 10.0, "target": 21.0, "projection": 21.0}
    assert (found.rank_difference, found.rank_difference_lowest) == (25.0, 19.0)
    assert found.failure is None


def test_a_run_without_metrics_has_a_row_of_dashes_and_its_reason(tmp_path: Path) -> None:
    runs = swept(tmp_path)
    table = markdown(rows(runs), "On an abacus.").splitlines()
    assert table[11] == "| no filter | zero | 50.0 | – | – | – | – | – | – | – |"  # noqa: RUF001
    assert table[-1] == "Not complete: no filter: it stopped."
    assert len(table) == 2 + len(GRID) + 3
    assert {text.count("|") for text in table[:12]} == {11}


def test_the_conditions_name_data_epochs_seed_and_machine(tmp_path: Path) -> None:
    text = conditions(swept(tmp_path), threads=1, jobs=2)
    for words in ("digits, 2 epochs, batch 336, seed 0", "2 at a time", "an abacus", "torch 2.99"):
        assert words in text


def test_the_figure_has_every_run_that_has_ranks(tmp_path: Path) -> None:
    runs = swept(tmp_path)
    with style.applied():
        picture = figure(rows(runs), runs)
        nothing = figure(rows(runs)[-1:], runs)
    assert nothing is None and picture is not None
    assert picture.alt.count("rank difference") == 9
    assert struct.unpack(">II", picture.png[16:24])[0] == style.WIDTH * style.DPI
