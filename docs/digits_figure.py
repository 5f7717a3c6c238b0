"""Draws the README's first picture: spectra and effective ranks with and without a filter.

    python docs/digits_figure.py runs/digits_rdm_simsiam runs/digits_no_filter docs/digits.png

Both runs must be trained and evaluated. Needs matplotlib: `pip install "rdm-fast[plot]"`.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLORS = ("#1b6ca8", "#c8553d")


def evaluation(run: Path) -> dict:
    """The run's newest evaluation."""
    return json.loads(max((run / "evaluation").glob("*.json")).read_text())


def history(run: Path, key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of a metric."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if key in line]
    return [row["epoch"] for row in rows], [row[key] for row in rows]


def draw(with_filter: Path, without: Path, file: Path) -> None:
    """Left: eigenvalues of the test images' projections. Right: effective rank during training."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for run, label, color in zip(
        (with_filter, without), ("with spectral filter", "without"), COLORS, strict=True
    ):
        result = evaluation(run)
        values = result["eigenvalues"]
        share = [value / sum(values) for value in values]
        name = f"{label}: {result['top1']:.1f} % linear top-1"
        left.semilogy(range(1, len(share) + 1), share, color=color, label=name, linewidth=2)
        epochs, rank = history(run, "effective_rank/projection")
        right.plot(epochs, rank, color=color, linewidth=2)
        right.annotate(
            f"{label}: {rank[-1]:.1f}",
            (epochs[-1], rank[-1]),
            xytext=(0, 14),
            textcoords="offset points",
            ha="right",
            color=color,
        )
    left.set(xlabel="direction", ylabel="share of variance", ylim=(1e-8, 1), xlim=(0, None))
    left.set_title("Spectrum of the projections of test images", fontsize=11)
    left.legend(frameon=False)
    right.set(xlabel="epoch", ylabel="effective rank", ylim=(0, 75), xlim=(0, None))
    right.set_title("Directions in use while training", fontsize=11)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("error: give a run with a filter, a run without, and the picture's file")
    draw(*map(Path, sys.argv[1:]))
