"""Figures of one moment: spectra, a filter's effect on them, embeddings."""

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
    panels,
    png,
)

EARLIER = 4
"""Number of earlier spectra beside the newest."""
FLOOR = 1e-10
"""Smaller shares of variance are rounding and not drawn."""
ABSENT = "No spectra were recorded, and no checkpoint could be used."


def spectra(pairs: Sequence[tuple[Run, Sequence[Spectra]]]) -> Picture:
    """Eigenvalues of both branches' outputs, one panel for each run."""
    name, title = "spectra", "Eigenvalue spectra"
    if not pairs:
        return Picture(name, title, ABSENT)
    figure, all_axes = panels([run.label for run, _ in pairs], (3.4, 2.7), sharex=True, sharey=True)
    for axes, (_, records) in zip(all_axes, pairs, strict=True):
        *earlier, newest = records
        for record in earlier[:: max(1, math.ceil(len(earlier) / EARLIER))]:
            thin = {"color": "#9A9A9A", "linewidth": 0.7, "zorder": 1.2}
            axes.plot(*_shares(record.projection), label="projections earlier", **thin)
        for branch, label, style in BRANCHES:
            axes.plot(*_shares(getattr(newest, branch)), label=label, **style)
        axes.set_yscale("log")
        axes.tick_params(labelbottom=True)
        axes.set(xlabel="direction, strongest first")
    label_left(all_axes, "share of variance")
    legend_above(figure, all_axes)
    steps = {run.label: f"{records[-1].step:,}" for run, records in pairs}
    one = len({*steps.values()}) == 1
    when = steps[pairs[0][0].label] if one else ", ".join(map(" ".join, steps.items()))
    return Picture(
        name,
        title,
        "Eigenvalues of the correlation matrices of the online branch's output, the target "
        "branch's output and the projections, as shares of their sum, in a training batch (mean "
        "over views; over four batches if training recorded none). Thin: up to "
        f"{EARLIER} earlier steps. Shares under {FLOOR:.0e} are rounding and not drawn. Step: "
        f"{when}.",
        "Falling lines; the flatter one is the branch with the higher effective rank",
        png(figure),
    )


def _shares(eigenvalues: Array) -> tuple[Array, Array]:
    """Numbers of the directions, from 1, and their shares of the sum, above FLOOR."""
    share = eigenvalues / max(eigenvalues.sum(), np.finfo(np.float64).tiny)
    drawn = share > FLOOR
    return np.arange(1.0, len(share) + 1)[drawn], share[drawn]


def responses(runs: Sequence[Run], pairs: Sequence[tuple[Run, Sequence[Spectra]]]) -> Picture:
    """g(s), measured on the projections' directions."""
    name, title = "response", "Filter response"
    if not pairs:
        return Picture(name, title, ABSENT)
    figure, (axes,) = canvas(1, 1, 3.6)
    labels = [run.label for run in runs]
    for run, records in pairs:
        style = line_style(labels.index(run.label))
        if run.config is not None and run.config.predictor == "mlp":
            style |= {"marker": "o", "markersize": 3, "linestyle": "none"}
        draw_response(axes, records[-1], label=run.label, **style)
    axes.set(xlabel="strength of a direction, s / s_max")
    axes.set_ylabel("|g(s)| / |g(s_max)|")
    legend_above(figure, [axes])
    return Picture(
        name,
        title,
        "How much the predictor or filter scales each principal direction of its input, relative "
        "to the strongest: the slope of output against input along that direction, which for a "
        "spectral filter is g(s). Rising is low-pass (strong directions are amplified); on the "
        "target, RDM asks for falling. Dots: a learned predictor. Directions that are cut off are "
        "not drawn; log s is negative for s under 1.",
        "Lines of g over s on logarithmic axes",
        png(figure),
    )


def draw_response(axes: Any, record: Spectra, **style: Any) -> None:
    """|g(s)| relative to that of the strongest direction that has a response."""
    s, g = record.s, np.abs(record.response)
    drawn = np.isfinite(g) & (g > 0) & (s > 0)
    if drawn.any():
        first = np.argmax(drawn)
        axes.plot(s[drawn] / s[first], g[drawn] / g[first], **style)
    axes.set(xscale="log", yscale="log")


def embedding_map(maps: Sequence[tuple[Run, Array, Embeddings]], method: str) -> Picture:
    """Embeddings in two dimensions, one panel for each run.

    Args:
        maps: run, points [n, 2] and their embeddings.
        method: name of the layout, for the caption.
    """
    figure, all_axes = panels([run.label for run, *_ in maps], (5.6, 4.2, 2.7))
    for axes, (_, points, embeddings) in zip(all_axes, maps, strict=True):
        _scatter(axes, points, embeddings.labels, embeddings.classes)
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
        "Points in groups; kNN accuracy measures how pure the groups are",
        png(figure),
    )


def _scatter(axes: Any, points: Any, labels: Any, classes: Sequence[str]) -> None:
    """Points by class; up to ten classes have their own colors, and names at their medians."""
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
