"""The paper's picture: every method on digits, and what DINO and SwAV do without their parts."""

import shutil

from bench.machine import ROOT
from bench.measured import SEEDS, SWEEP, Column, Runs, Values, sweep_values, swept

NAME = "digits_methods"
METHODS = {
    key: Column(column.decimals, 0.5 if column.decimals == 1 else 0.1)
    for key, column in SWEEP.items()
}


def measure_methods(runs: Runs, quick: bool) -> Values:
    """The results of `rdm sweep digits_methods` over all seeds."""
    return sweep_values(row for seed in SEEDS for row in swept(runs, NAME, seed))


def draw_methods(runs: Runs) -> None:
    shutil.copy(runs.folder / f"sweep_{NAME}-0" / "branches.png", ROOT / "docs" / "methods.png")
