"""rdm_fast.tools.sweep.results: every number of the table is from the run it is named after."""

import struct

import pytest

from rdm_fast.tools.report import style
from rdm_fast.tools.report.read import Run, read_run
from rdm_fast.tools.sweep.grid import GRID, configure
from rdm_fast.tools.sweep.queue import Failure
from rdm_fast.tools.sweep.results import Row, conditions, figure, markdown, row
from tests.tiny import tiny
from tests.tools.report.made import evaluate, line, make_run

Swept = tuple[dict[str, Run], list[Row]]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """The grid, each run with metrics of its own; the last has none."""
    folder = tmp_path_factory.mktemp("sweep")
    runs = {}
    for i, name in enumerate(GRID):
        lines = [line(step, rank_difference=10 * i + step - 3.0) for step in (4, 2, 8)]
        path = make_run(folder / name, configure(tiny(), name), lines if i < 9 else [])
        if i < 9:
            evaluate(path, top1=90.0 + i)
        runs[name] = read_run(path, name)
    failures = {"control": Failure(71, "it stopped")}
    return runs, [row(run, name, failures.get(name)) for name, run in runs.items()]


def test_a_row_has_the_last_values_and_the_lowest_rank_difference(swept: Swept) -> None:
    found = swept[1][2]
    assert (found.name, found.filter, found.predicted) == ("online_log", "online log s", "positive")
    assert (found.probe_top1, found.knn_top1, found.protocol) == (92.0, 88.0, "logistic")
    assert found.effective_rank == {"online": 10.0, "target": 21.0, "projection": 21.0}
    assert (found.rank_difference, found.rank_difference_lowest) == (25.0, 19.0)
    assert found.failure is None


def test_a_run_without_metrics_has_a_row_of_dashes_and_its_reason(swept: Swept) -> None:
    table = markdown(swept[1], "On an abacus.").splitlines()
    assert table[11] == "| no filter | zero | 50.0 | – | – | – | – | – | – | – |"  # noqa: RUF001
    assert "no filter: it stopped" in table[-1]
    assert len(table) == 2 + len(GRID) + 3
    assert {text.count("|") for text in table[:12]} == {11}


def test_the_conditions_name_data_epochs_seed_and_machine(swept: Swept) -> None:
    text = conditions(swept[0], threads=1, jobs=2)
    for part in ("digits, 2 epochs, batch 336, seed 0", "2 at a time", "an abacus", "torch 2.99"):
        assert part in text


def test_the_figure_has_every_run_that_has_ranks(swept: Swept) -> None:
    runs, rows = swept
    with style.applied():
        picture = figure(rows, runs)
        assert figure(rows[-1:], runs) is None
    assert picture is not None and picture.alt.count("rank difference") == 9
    assert struct.unpack(">II", picture.png[16:24])[0] == style.WIDTH * style.DPI
