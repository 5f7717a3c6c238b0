"""Figures over time. Each function takes runs and returns a figure, or a sentence without data."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rdm_fast.tools.report.read import Run
from rdm_fast.tools.report.style import (
    BRANCHES,
    DASHES,
    RUNS,
    TARGET,
    Picture,
    canvas,
    label_left,
    legend_above,
    line_style,
    panels,
    png,
)


def with_values(runs: Sequence[Run], key: str) -> list[tuple[int, Run]]:
    """The runs with at least one finite value of a metric, and their numbers."""
    return [(i, run) for i, run in enumerate(runs) if run.series(key).last is not None]


def _curve(axes: Any, run: Run, key: str, **style: Any) -> None:
    """A metric over epochs; one or two values are dots."""
    series = run.series(key)
    marker = "o" if sum(map(math.isfinite, series.values)) < 3 else None
    axes.plot(series.epochs, series.values, marker=marker, markersize=4, **style)


def _curves(axes: Any, runs: Sequence[Run], key: str, ylabel: str) -> None:
    for i, run in with_values(runs, key):
        _curve(axes, run, key, label=run.label, **line_style(i))
    axes.set(xlabel="epoch", ylabel=ylabel)


def _final(runs: Sequence[Run], key: str, digits: str) -> str:
    """The last values as text."""
    lasts = [(run.label, run.series(key).last) for run in runs]
    return ", ".join(f"{label} {last:{digits}}" for label, last in lasts if last is not None)


def loss(runs: Sequence[Run]) -> Picture:
    """The loss over time."""
    name, title = "loss", "Loss"
    if not with_values(runs, "loss"):
        return Picture(name, title, "No loss was logged.")
    figure, (axes,) = canvas(1, 1, 3.4)
    _curves(axes, runs, "loss", "loss")
    legend_above(figure, [axes])
    return Picture(
        name,
        title,
        "Loss of the logged steps over the global batch: the mean negative cosine of predictions "
        "and targets, at least -1 (all alike); for BYOL 4 more than 4 times that. A collapsed run "
        "has a low loss too, so it does not measure quality.",
        f"Lines over epochs; last values: {_final(runs, 'loss', '.3f')}",
        png(figure),
    )


def accuracy(runs: Sequence[Run]) -> Picture:
    """kNN and the online probe during training, the linear probe afterwards."""
    name, title = "accuracy", "Accuracy"
    logged = {
        "knn_top1": "kNN", "knn_top1_target": "kNN, target weights", "probe_top1": "online probe",
    }  # fmt: skip
    keys = [key for key in logged if with_values(runs, key)]
    probed = [(i, run, top1) for i, run in enumerate(runs) if (top1 := _top1(run)) is not None]
    if not keys and not probed:
        absent = "No accuracy was logged (log.knn_every 0, or no labels), and no run was evaluated."
        return Picture(name, title, absent)
    of_target = _final(runs, "knn_top1_target", ".1f")
    figure, all_axes = canvas(1, len(keys) + bool(probed), 3.4)
    for axes, key in zip(all_axes, keys, strict=False):
        _curves(axes, runs, key, f"{logged[key]} top-1 accuracy (%)")
    if probed:
        _probe_dots(all_axes[-1], probed)
    legend_above(figure, all_axes[: len(keys)])
    return Picture(
        name,
        title,
        "Top-1 accuracy on the test images from the backbone's frozen embeddings: of weighted kNN "
        "during training, and of a linear probe afterwards for runs that were evaluated.",
        f"kNN, last values in percent: {_final(runs, 'knn_top1', '.1f') or 'none'}"
        + (f", of target weights: {of_target}" if of_target else "")
        + ". Linear probe: "
        + (", ".join(f"{run.label} {top1:.1f}" for _, run, top1 in probed) or "none"),
        png(figure),
    )


def _top1(run: Run) -> float | None:
    top1 = run.evaluation.get("top1")
    return float(top1) if isinstance(top1, int | float) else None


def _probe_dots(axes: Any, probed: Sequence[tuple[int, Run, float]]) -> None:
    """One dot for each run; not a bar, since the axis need not begin at 0."""
    for row, (i, _, top1) in enumerate(probed):
        axes.plot([top1], [row], "o", markersize=7, color=line_style(i)["color"])
        axes.annotate(
            f"{top1:.1f}", (top1, row), xytext=(7, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(probed)), [run.label for _, run, _ in probed])
    low = min(top1 for *_, top1 in probed)
    axes.set(xlabel="linear probe top-1 accuracy (%)", ylim=(len(probed) - 0.4, -0.6))
    axes.set_xlim(max(0, low - 0.35 * (101 - low)), 101)


def draw_ranks(axes: Any, run: Run) -> None:
    """Effective rank of both branches and of the projections; their difference is shaded."""
    for branch, label, style in BRANCHES:
        _curve(axes, run, f"effective_rank/{branch}", label=label, **style)
    online, target = (run.series(f"effective_rank/{each}") for each in ("online", "target"))
    if online.epochs == target.epochs:
        low, high = np.array(online.values), np.array(target.values)
        shade = {"linewidth": 0, "alpha": 0.18}
        axes.fill_between(online.epochs, low, high, where=low < high, color=TARGET, **shade)
        axes.fill_between(online.epochs, low, high, where=low > high, color="black", **shade)
    axes.set(xlabel="epoch")


def effective_ranks(runs: Sequence[Run]) -> Picture:
    """Effective rank of both branches' outputs, one panel for each run."""
    name, title = "effective-rank", "Effective rank"
    shown = [run for _, run in with_values(runs, "effective_rank/online")]
    if not shown:
        return Picture(name, title, "No effective rank was logged.")
    figure, all_axes = panels([run.label for run in shown], (3.4, 2.7), sharey=True)
    for axes, run in zip(all_axes, shown, strict=True):
        draw_ranks(axes, run)
    all_axes[0].set_ylim(bottom=0)  # the axis is shared, so this comes after all curves
    label_left(all_axes, "effective rank")
    legend_above(figure, all_axes[:1])
    return Picture(
        name,
        title,
        "Number of directions used by the output of the online branch (after predictor or "
        "filter), by that of the target branch, and by the projections before any filter: exp of "
        "the entropy of their spectrum, on the batch of the logged step. Shaded: the difference; "
        "dark where the online branch has the higher rank, which RDM advises against.",
        "Last values: "
        + "; ".join(
            f"{run.label} online {run.series('effective_rank/online').last:.1f}, target "
            f"{run.series('effective_rank/target').last or math.nan:.1f}"
            for run in shown
        ),
        png(figure),
    )


def rank_difference(runs: Sequence[Run]) -> Picture:
    """Effective rank of the target minus that of the online branch, RDM's central quantity."""
    name, title = "rank-difference", "Rank difference"
    if not with_values(runs, "rank_difference"):
        return Picture(name, title, "No rank difference was logged.")
    figure, (axes,) = canvas(1, 1, 3.4)
    axes.axhline(0, color="#333333", linewidth=1)
    _curves(axes, runs, "rank_difference", "rank difference (target - online)")
    legend_above(figure, [axes])
    return Picture(
        name,
        title,
        "Effective rank of the target branch's output minus that of the online branch's. RDM "
        "predicts that training raises the rank of the projections while it is positive, and that "
        "they collapse into few directions where it is zero or negative.",
        f"Lines over epochs; last values: {_final(runs, 'rank_difference', '.2f')}",
        png(figure),
    )


PARTS = {"ema": "older weights", "sharpening": "lower temperature", "centring": "center",
         "equipartition": "Sinkhorn"}  # fmt: skip
"""Of the rank difference of DINO and SwAV, and what makes them."""


def attribution(runs: Sequence[Run]) -> Picture | None:
    """What moves the ranks of DINO's and SwAV's branches apart; None without such a run."""
    shown = [run for _, run in with_values(runs, "rank_difference/sharpening")]
    if not shown:
        return None
    figure, all_axes = panels([run.label for run in shown], (3.4, 2.7))
    lasts = []
    for axes, run in zip(all_axes, shown, strict=True):
        axes.axhline(0, color="#333333", linewidth=1)
        for i, (part, label) in enumerate(PARTS.items()):
            key = f"rank_difference/{part}"
            if (last := run.series(key).last) is not None:
                style = {"color": RUNS[i], "linestyle": DASHES[i % len(DASHES)]}
                _curve(axes, run, key, label=label, **style)
                lasts.append(f"{run.label} {label} {last:.2f}")
        axes.set(xlabel="epoch")
    label_left(all_axes, "part of the rank difference")
    legend_above(figure, all_axes)
    return Picture(
        "attribution",
        "What moves the ranks apart",
        "The rank difference of DINO and SwAV as a sum: what the older target weights add to it, "
        "the lower temperature of the targets, and the center or Sinkhorn. Ranks are those of the "
        "outputs after the softmax. Before it, the difference can have the other sign.",
        f"Lines over epochs; last values: {'; '.join(lasts)}",
        png(figure),
    )


def throughput(runs: Sequence[Run]) -> Picture:
    """Images per second, and the share of a step that waits for data."""
    name, title = "throughput", "Throughput"
    shown = with_values(runs, "images_per_s")
    if not shown:
        return Picture(name, title, "No throughput was logged.")
    figure, (left, right) = canvas(1, 2, 3.2)
    _curves(left, runs, "images_per_s", "images/s")
    for i, run in shown:
        waits, speed = run.series("data_wait_s"), run.series("images_per_s")
        if run.config and waits.epochs == speed.epochs:
            batch = run.config.optim.global_batch
            share = [100 * a * b / batch for a, b in zip(waits.values, speed.values, strict=True)]
            right.plot(waits.epochs, share, **line_style(i))
    right.set(xlabel="epoch", ylabel="time waiting for data (%)")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
    legend_above(figure, [left])
    medians = ", ".join(f"{run.label} {run.median_speed():,.0f}" for _, run in shown)
    return Picture(
        name,
        title,
        "Images of the global batch per second in each logged interval, without evaluation and "
        "saving, and the share of that time in which the loop waited for data.",
        f"Median images per second: {medians}",
        png(figure),
    )


OVER_TIME: tuple[Callable[[Sequence[Run]], Picture | None], ...] = (
    *(rank_difference, attribution, effective_ranks, loss, accuracy, throughput),
)
