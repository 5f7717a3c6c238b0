"""Figures of moments: spectra, what a filter does to them, embeddings."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rdm_fast.tools.report.measure import Array, Embeddings, Spectra
from rdm_fast.tools.report.read import Run
from rdm_fast.tools.report.style import (
    BRANCHES,
    CLASSES,
    PROJECTION,
    Picture,
    canvas,
    label_left,
    legend_above,
    line_style,
    panel_title,
    panels,
    png,
)

EARLIER = 4
"""Earlier spectra that are drawn beside the newest."""
FLOOR = 1e-10
"""Shares of variance under it are not drawn: rounding."""


def spectra(pairs: Sequence[tuple[Run, Sequence[Spectra]]]) -> Picture:
    """Eigenvalues of both branches' outputs, the newest in full; one panel a run."""
    figure, all_axes = panels(len(pairs), 3.4 if len(pairs) == 1 else 2.7, sharex=True, sharey=True)
    for axes, (run, records) in zip(all_axes, pairs, strict=True):
        *earlier, newest = records
        for record in earlier[:: max(1, math.ceil(len(earlier) / EARLIER))]:
            thin = {"color": "#9A9A9A", "linewidth": 0.7, "zorder": 1.2}
            axes.plot(*_shares(record.projection), label="projections earlier", **thin)
        for branch, name, style in BRANCHES:
            axes.plot(*_shares(getattr(newest, branch)), label=name, **style)
        axes.set_yscale("log")
        axes.tick_params(labelbottom=True)
        axes.set_title(panel_title(run.label, len(pairs)))
        axes.set(xlabel="direction, strongest first")
    label_left(all_axes, "share of variance")
    legend_above(figure, all_axes)
    steps = {run.label: f"{records[-1].step:,}" for run, records in pairs}
    alike = len({*steps.values()}) == 1
    told = steps[pairs[0][0].label] if alike else ", ".join(map(" ".join, steps.items()))
    return Picture(
        "spectra",
        "Eigenvalue spectra",
        "Eigenvalues of the correlation matrix of the online branch's output, of the target "
        "branch's and of the projections, as shares of their sum, in a training batch (mean over "
        f"views; over four batches where training recorded none). Thin: up to {EARLIER} earlier "
        f"moments. Shares under {FLOOR:.0e} are rounding and not drawn. Step: {told}.",
        "Falling lines; the flatter one is the branch with the higher effective rank",
        png(figure),
    )


def _shares(eigenvalues: Array) -> tuple[Array, Array]:
    """Number of a direction, from 1, and its share of the sum, of those that are not rounding."""
    share = eigenvalues / max(eigenvalues.sum(), np.finfo(np.float64).tiny)
    drawn = share > FLOOR
    return np.arange(1.0, len(share) + 1)[drawn], share[drawn]


def responses(runs: Sequence[Run], pairs: Sequence[tuple[Run, Sequence[Spectra]]]) -> Picture:
    """g(s), as it acts on the projections' directions."""
    figure, (axes,) = canvas(1, 1, 3.6)
    labels = [run.label for run in runs]
    for run, records in pairs:
        s, g = records[-1].s, np.abs(records[-1].response)
        drawn = np.isfinite(g) & (g > 0) & (s > 0)
        if not drawn.any():
            continue
        first = np.argmax(drawn)
        style = line_style(labels.index(run.label))
        if run.config is not None and run.config.predictor == "mlp":
            style |= {"marker": "o", "markersize": 3, "linestyle": "none"}
        axes.plot(s[drawn] / s[first], g[drawn] / g[first], label=run.label, **style)
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


def embedding_map(maps: Sequence[tuple[Run, Array, Embeddings]], method: str) -> Picture:
    """Embeddings in two dimensions, one panel a run.

    Args:
        maps: run, points [n, 2] and whose they are.
        method: name of the layout, for the caption.
    """
    figure, all_axes = panels(len(maps), 5.6 if len(maps) == 1 else 4.2 if len(maps) == 2 else 2.7)
    for axes, (run, points, embeddings) in zip(all_axes, maps, strict=True):
        _scatter(axes, points, embeddings.labels, embeddings.classes)
        axes.set_title(panel_title(run.label, len(maps)))
        axes.set(xticks=[], yticks=[])
        axes.set_box_aspect(1)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(True)
    counts = " and ".join(sorted({f"{len(points):,}" for _, points, _ in maps}))
    return Picture(
        "map",
        "Map of embeddings",
        f"Embeddings of {counts} test images in two dimensions by {method}, colored by class; "
        "labels were not used. Axes have no unit, and distances between groups no meaning.",
        "Points in groups; how far they are of one class each is what kNN accuracy measures",
        png(figure),
    )


def _scatter(axes: Any, points: Any, labels: Any, classes: Sequence[str]) -> None:
    """Up to ten classes have colors of their own and their names at their medians."""
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
