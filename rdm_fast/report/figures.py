"""The figures of a report. Each takes runs, and gives a picture or, without data, a sentence."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rdm_fast.report.measure import Measurement
from rdm_fast.report.read import Run
from rdm_fast.report.style import (
    CLASSES,
    ONLINE,
    PROJECTION,
    TARGET,
    Picture,
    canvas,
    legend_above,
    line_style,
    panels,
    png,
)

Pair = tuple[Run, Measurement]
FLOOR = 1e-10
"""Shares of variance under it are not drawn: rounding."""
BRANCHES = (
    ("online", "online branch", {"color": ONLINE}),
    ("target", "target branch", {"color": TARGET, "linestyle": (0, (5, 2))}),
    ("projection", "projections", {"color": PROJECTION, "linewidth": 5, "zorder": 1.5}),
)
"""The projections are one of the two where only the other is filtered: a band under it."""


def over_time(runs: Sequence[Run], key: str) -> list[tuple[int, Run]]:
    """Runs with at least one finite value of a metric, with their numbers."""
    return [(i, run) for i, run in enumerate(runs) if run.series(key).last is not None]


def _curve(axes: Any, run: Run, key: str, scale: float = 1.0, **style: Any) -> None:
    """A metric over epochs; a single value is a dot."""
    series = run.series(key)
    marker = "o" if sum(map(math.isfinite, series.values)) < 3 else None
    values = [scale * value for value in series.values]
    axes.plot(series.epochs, values, marker=marker, markersize=4, **style)


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
        axes.set_title(_panel_title(run, len(shown)))
        axes.set(xlabel="epoch")
    all_axes[0].set_ylim(bottom=0)  # shared, so once all is drawn
    _label_left(all_axes, "effective rank")
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


def _panel_title(run: Run, count: int) -> str:
    width = 60 if count <= 2 else 110 // math.ceil(count / math.ceil(count / 5))
    text = run.label
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _label_left(all_axes: Sequence[Any], text: str) -> None:
    for axes in all_axes:
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(text)


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


# ---- from checkpoints ------------------------------------------------------------------------


def spectra(pairs: Sequence[Pair]) -> Picture:
    """Eigenvalues of both branches' outputs, one panel a run."""
    figure, all_axes = panels(len(pairs), 3.4 if len(pairs) == 1 else 2.7, sharex=True, sharey=True)
    for axes, (run, measured) in zip(all_axes, pairs, strict=True):
        for branch, name, style in BRANCHES:
            values = getattr(measured.spectra, branch)
            share = values / values.sum() if values.sum() > 0 else values
            index = np.arange(1, len(share) + 1)
            axes.plot(index[share > FLOOR], share[share > FLOOR], label=name, **style)
        axes.set_yscale("log")
        axes.tick_params(labelbottom=True)
        axes.set_title(_panel_title(run, len(pairs)))
        axes.set(xlabel="direction, strongest first")
    _label_left(all_axes, "share of variance")
    legend_above(figure, all_axes[:1])
    batches = " and ".join(sorted({str(measured.spectra.batch) for _, measured in pairs}))
    return Picture(
        "spectra",
        "Eigenvalue spectra",
        "Eigenvalues of the correlation matrix of the online branch's output, of the target "
        "branch's and of the projections, as shares of their sum: of the newest checkpoint, on "
        f"training views, mean over four batches of {batches} images. "
        f"Shares under {FLOOR:.0e} are rounding and not drawn.",
        "Falling lines; the flatter one is the branch with the higher effective rank",
        png(figure),
    )


def responses(runs: Sequence[Run], pairs: Sequence[Pair]) -> Picture:
    """g(s), as it acts on the projections' directions."""
    figure, (axes,) = canvas(1, 1, 3.6)
    labels = [run.label for run in runs]
    for run, measured in pairs:
        s, g = measured.spectra.strength, np.abs(measured.spectra.response)
        drawn = np.isfinite(g) & (g > 0) & (s > 0)
        if not drawn.any():
            continue
        first = np.argmax(drawn)
        style = line_style(labels.index(run.label))
        learned = run.config is not None and run.config.predictor == "mlp"
        marks = {"marker": "o", "markersize": 3, "linestyle": "none"} if learned else {}
        axes.plot(s[drawn] / s[first], g[drawn] / g[first], label=run.label, **{**style, **marks})
    axes.set(xscale="log", yscale="log", xlabel="strength of a direction, s / s_max")
    axes.set_ylabel("|g(s)| / |g(s_max)|")
    legend_above(figure, [axes])
    return Picture(
        "response",
        "Filter response",
        "By what the predictor or filter scales each principal direction of its input, relative to "
        "the strongest one: the slope of the outcome's coordinate on the input's along that "
        "direction, which for a spectral filter is g(s). Rising is low-pass (strong directions "
        "are amplified), falling is what RDM wants on the target. Dots: a learned predictor. Cut "
        "off directions are not drawn; log s is negative under s = 1.",
        "Lines of g over s on logarithmic axes",
        png(figure),
    )


def embedding_map(maps: Sequence[tuple[Run, Any, Measurement]], method: str) -> Picture:
    """Embeddings in two dimensions, one panel a run.

    Args:
        maps: run, points [n, 2] and what was measured.
        method: name of the layout, for the caption.
    """
    figure, all_axes = panels(len(maps), 5.6 if len(maps) == 1 else 4.2 if len(maps) == 2 else 2.7)
    for axes, (run, points, measured) in zip(all_axes, maps, strict=True):
        assert measured.embeddings is not None
        _scatter(axes, points, measured.embeddings.labels, measured.embeddings.classes)
        axes.set_title(_panel_title(run, len(maps)))
        axes.set(xticks=[], yticks=[])
        axes.set_box_aspect(1)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(True)
    counts = " and ".join(sorted({f"{len(points):,}" for _, points, _ in maps}))
    return Picture(
        "map",
        "Map of embeddings",
        f"Embeddings of {counts} test images in two dimensions by {method}, coloured by class; "
        "labels were not used. Axes have no unit, and distances between groups no meaning.",
        "Points in groups; how far they are of one class each is what kNN accuracy measures",
        png(figure),
    )


def _scatter(axes: Any, points: Any, labels: Any, classes: Sequence[str]) -> None:
    """Up to ten classes have colours of their own and their names at their medians."""
    dots = {"s": 60_000 / (len(points) + 2000), "linewidths": 0, "alpha": 0.85}
    if labels is None or (labels < 0).all():
        axes.scatter(*points.T, color=PROJECTION, **dots)
        return
    if len(classes) > len(CLASSES):
        axes.scatter(*points.T, c=labels, cmap="viridis", **dots)
        return
    from matplotlib.patheffects import withStroke

    for label, name in enumerate(classes):
        own = points[labels == label]
        if len(own) == 0:
            continue
        axes.scatter(*own.T, color=CLASSES[label], **dots)
        text = axes.text(*np.median(own, axis=0), name, ha="center", va="center", weight="bold")
        text.set(
            fontsize=9, color="black", path_effects=[withStroke(linewidth=2.5, foreground="w")]
        )
