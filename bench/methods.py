"""The paper's picture: every method on digits, and what DINO and SwAV do without their parts."""

import shutil

from bench.machine import ROOT
from bench.measured import KNN, LINEAR, SEEDS, SWEEP, Column, Runs, Values, sweep_values, swept
from rdm_fast.tools.report import style
from rdm_fast.tools.report.read import read_run
from rdm_fast.tools.sweep.comparison import compare
from rdm_fast.tools.sweep.methods import TITLES

NAME = "digits_methods"
SHOWN = {name: TITLES[name] for name in ("simsiam", "byol", "swav", "dino", "symsimsiam")}
"""On the first page; all are in docs/sweep.md."""
BRIEF = (KNN, LINEAR, "projections", "rank difference, last")
METHODS = {
    key: Column(column.decimals, 0.5 if column.decimals == 1 else 0.1)
    for key, column in SWEEP.items()
}


def measure_methods(runs: Runs, quick: bool) -> Values:
    """The results of `rdm sweep digits_methods` over all seeds."""
    return sweep_values(row for seed in SEEDS for row in swept(runs, NAME, seed))


def measure_filtered(runs: Runs, quick: bool) -> Values:
    """DINO and SwAV with the paper's filters in place of their own parts."""
    return sweep_values(
        row | {"filter": f"{TITLES[method]}, {row['filter']}"}
        for method in ("dino", "swav")
        for row in swept(runs, f"digits_{method}", 0)
    )


def draw_methods(runs: Runs) -> None:
    folder, docs = runs.folder / f"sweep_{NAME}-0", ROOT / "docs"
    shutil.copy(folder / "branches.png", docs / "methods.png")
    with style.applied():
        picture = compare(
            [read_run(folder / name, title) for name, title in SHOWN.items()], responses=False
        )
    assert picture is not None and picture.png is not None
    (docs / "methods_ranks.png").write_bytes(picture.png)
