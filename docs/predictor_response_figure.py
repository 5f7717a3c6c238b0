"""Draws the measured response g(s) of learned predictors, which are low-pass filters.

    rdm train digits_simsiam
    rdm train digits_byol
    python docs/predictor_response_figure.py runs/digits_simsiam runs/digits_byol docs/predictor_response.png

Reads each run's spectrum.jsonl. Needs matplotlib: `pip install "rdm-fast[plot]"`.
"""  # noqa: E501

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import spearmanr

from rdm_fast.telemetry import read_spectra

COLORS = ("#1b6ca8", "#c8553d")
LAST = 3  # records; the learning rate is almost zero by then


def measured(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Singular values and responses, averaged over the last records, of directions kept in all."""
    records = read_spectra(run / "spectrum.jsonl")[-LAST:]
    if not records:
        sys.exit(f"error: {run} has no spectra: train it with --log.spectrum-every above 0")
    s, g = (np.mean([record[key] for record in records], axis=0) for key in ("s", "response"))
    kept = np.isfinite(g)
    return s[kept], g[kept]


def smooth(g: np.ndarray, width: int = 9) -> np.ndarray:
    """Running median over directions, which are sorted by strength."""
    padded = np.pad(g, width // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)


def draw(runs: list[Path], file: Path) -> None:
    """One panel per run: a point for each direction, and the running median."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        1, len(runs), figsize=(5 * len(runs), 3.8), layout="constrained", squeeze=False
    )
    for axis, run, color in zip(axes[0], runs, COLORS, strict=False):
        s, g = measured(run)
        axis.axhline(0, color="0.8", linewidth=1)
        axis.semilogx(s / s[0], g, ".", color=color, alpha=0.5, label="one direction")
        axis.semilogx(s / s[0], smooth(g), color=color, linewidth=2, label="running median")
        rho = spearmanr(s, g).statistic
        axis.set(xlabel="strength of the direction, s / s_max", ylabel="measured response g(s)")
        axis.set_title(f"{run.name}: rank correlation {rho:.2f}, n = {len(s)}", fontsize=11)
        axis.legend(frameon=False, loc="upper left")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("error: give one or two runs with a learned predictor, and the picture's file")
    draw([Path(word) for word in sys.argv[1:-1]], Path(sys.argv[-1]))
