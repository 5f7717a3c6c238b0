"""Figures over time. Each takes runs, and gives a picture or, without data, a sentence."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rdm_fast.tools.report.read import Run
from rdm_fast.tools.report.style import (
    BRANCHES,
    TARGET,
    Picture,
    canvas,
    label_left,
    legend_above,
    line_style,
    panel_title,
    panels,
    png,
)


def over_time(runs: Sequence[Run], key: str) -> list[tuple[int, Run]]:
    """Runs with at least one finite value of a metric, with their numbers."""
    return [(i, run) for i, run in enumerate(runs) if run.series(key).last is not None]


def _curve(axes: Any, run: Run, key: str, **style: Any) -> None:
    """A metric over epochs; a single value is a dot."""
    series = run.series(key)
    marker = "o" if sum(map(math.isfinite, series.values)) < 3 else None
    axes.plot(series.epochs, series.values, marker=marker, markersize=4, **style)


def _final(runs: Sequence[Run], key: str, digits: str) -> str:
    """Last values in words."""
    lasts = [(run.label, run.series(key).last) for run in runs]
    return ", ".join(f"{label} {last:{digits}}" for label, last in lasts if last is not None)


# ---- over time -------------------------------------------------------------------------------


def loss(runs: Sequence[Run]) -> Picture | str:
    """The loss of both branches, which is a cosine."""
    shown = over_time(runs, "loss")
    if not shown:
        return "No loss was logged."
    figure, (axes,) = canvas(1, 1, 3.4)
    for i, run in shown:
        _curve(axes, run, "loss", label=run.label, **line_style(i))
    axes.set(xlabel="epoch", ylabel="loss (negative cosine)")
    legend_above(figure, [axes])
    return Picture(
        "loss",
        "Loss",
        "Loss of the logged steps over the global batch: the mean negative cosine of predictions "
        "and targets, from -1 (all alike) up. A collapsed run has a low loss too, so it is not a "
        "measure of quality.",
        f"Lines over epochs; last values: {_final(runs, 'loss', '.3f')}",
        png(figure),
    )


def accuracy(runs: Sequence[Run]) -> Picture | str:
    """kNN and online probe while training, the linear probe afterwards."""
    keys = [key for key in ("knn_top1", "probe_top1") if over_time(runs, key)]
    probed = [(i, run) for i, run in enumerate(runs) if _top1(run) is not None]
    if not keys and not probed:
        return "No accuracy was logged (log.knn_every 0, or no labels), and no run was evaluated."
    figure, all_axes = canvas(1, len(keys) + bool(probed), 3.4)
    for axes, key in zip(all_axes, keys, strict=False):
        for i, run in over_time(runs, key):
            _curve(axes, run, key, label=run.label, **line_style(i))
        name = {"knn_top1": "kNN", "probe_top1": "online probe"}[key]
        axes.set(xlabel="epoch", ylabel=f"{name} top-1 accuracy (%)")
    if probed:
        _probe_bars(all_axes[-1], probed)
    legend_above(figure, all_axes[: len(keys)])
    return Picture(
        "accuracy",
        "Accuracy",
        "Top-1 accuracy on the test images from the backbone's frozen embeddings: of weighted kNN "
        "while training, and of a linear probe afterwards where the run was evaluated.",
        f"kNN, last values in percent: {_final(runs, 'knn_top1', '.1f') or 'none'}. Linear probe: "
        + (", ".join(f"{run.label} {_top1(run):.1f}" for _, run in probed) or "none"),
        png(figure),
    )


def _top1(run: Run) -> float | None:
    top1 = run.evaluation.get("top1")
    return float(top1) if isinstance(top1, int | float) else None


def _probe_bars(axes: Any, probed: Sequence[tuple[int, Run]]) -> None:
    """Dots, since the axis need not begin at 0."""
    for row, (i, run) in enumerate(probed):
        top1 = _top1(run)
        assert top1 is not None
        axes.plot([top1], [row], "o", markersize=7, color=line_style(i)["color"])
        axes.annotate(
            f"{top1:.1f}", (top1, row), xytext=(7, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(probed)), [run.label for _, run in probed])
    low = min(_top1(run) or 0 for _, run in probed)
    axes.set(xlabel="linear probe top-1 accuracy (%)", ylim=(len(probed) - 0.4, -0.6))
    axes.set_xlim(max(0, low - 0.35 * (101 - low)), 101)


def effective_ranks(runs: Sequence[Run]) -> Picture | str:
    """Effective rank of both branches' outputs, one panel a run."""
    shown = [run for _, run in over_time(runs, "effective_rank/online")]
    if not shown:
        return "No effective rank was logged."
    figure, all_axes = panels(len(shown), 3.4 if len(shown) == 1 else 2.7, sharey=True)
    for axes, run in zip(all_axes, shown, strict=True):
        for branch, name, style in BRANCHES:
            _curve(axes, run, f"effective_rank/{branch}", label=name, **style)
        online, target = (run.series(f"effective_rank/{name}") for name in ("online", "target"))
        if online.epochs == target.epochs:
            low, high = np.array(online.values), np.array(target.values)
            above, below = low < high, low > high
            shade = {"linewidth": 0, "alpha": 0.18}
            axes.fill_between(online.epochs, low, high, where=above, color=TARGET, **shade)
            axes.fill_between(online.epochs, low, high, where=below, color="black", **shade)
        axes.set_title(panel_title(run.label, len(shown)))
        axes.set(xlabel="epoch")
    all_axes[0].set_ylim(bottom=0)  # shared, so once all is drawn
    label_left(all_axes, "effective rank")
    legend_above(figure, all_axes[:1])
    return Picture(
        "effective-rank",
        "Effective rank of both branches",
        "Directions that the outputs of the online branch (after predictor or filter) and of the "
        "target branch use, and the projections before any filter: exp of the entropy of their "
        "spectrum, on the batch of the logged step. Shaded: their difference; dark where the "
        "online branch has the higher rank, against what RDM asks for.",
        "Last values: "
        + "; ".join(
            f"{run.label} online {run.series('effective_rank/online').last:.1f}, target "
            f"{run.series('effective_rank/target').last or math.nan:.1f}"
            for run in shown
        ),
        png(figure),
    )


def rank_difference(runs: Sequence[Run]) -> Picture | str:
    """What RDM is about."""
    shown = over_time(runs, "rank_difference")
    if not shown:
        return "No rank difference was logged."
    figure, (axes,) = canvas(1, 1, 3.4)
    axes.axhline(0, color="#333333", linewidth=1)
    for i, run in shown:
        _curve(axes, run, "rank_difference", label=run.label, **line_style(i))
    axes.set(xlabel="epoch", ylabel="rank difference (target - online)")
    legend_above(figure, [axes])
    return Picture(
        "rank-difference",
        "Rank difference",
        "Effective rank of the target branch's output minus that of the online branch's. RDM "
        "predicts that training raises the rank of the projections while it is positive, and that "
        "they collapse into few directions where it is zero or negative.",
        f"Lines over epochs; last values: {_final(runs, 'rank_difference', '.2f')}",
        png(figure),
    )


def throughput(runs: Sequence[Run]) -> Picture | str:
    """Images a second, and how much of a step waits for data."""
    shown = over_time(runs, "images_per_s")
    if not shown:
        return "No throughput was logged."
    figure, (left, right) = canvas(1, 2, 3.2)
    for i, run in shown:
        _curve(left, run, "images_per_s", label=run.label, **line_style(i))
        waits, speed = run.series("data_wait_s"), run.series("images_per_s")
        if run.config and waits.epochs == speed.epochs:
            batch = run.config.optim.global_batch
            share = [
                100 * wait * images / batch
                for wait, images in zip(waits.values, speed.values, strict=True)
            ]
            right.plot(waits.epochs, share, **line_style(i))
    left.set(xlabel="epoch", ylabel="images/s")
    right.set(xlabel="epoch", ylabel="time waiting for data (%)")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
    legend_above(figure, [left])
    medians = ", ".join(f"{run.label} {run.median_speed():,.0f}" for _, run in shown)
    return Picture(
        "throughput",
        "Throughput",
        "Images of the global batch a second in each logged interval, without evaluations and "
        "saving, and the share of that time in which the loop waited for data.",
        f"Median images a second: {medians}",
        png(figure),
    )


OVER_TIME: tuple[Callable[[Sequence[Run]], Picture | str], ...] = (
    *(rank_difference, effective_ranks, loss, accuracy, throughput),
)
