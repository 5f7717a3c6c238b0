"""The runs of a sweep side by side: both branches' effective rank over time, and the response."""

import math
from collections.abc import Sequence

from rdm_fast.tools.report.curves import draw_ranks, with_values
from rdm_fast.tools.report.measure import recorded
from rdm_fast.tools.report.read import Run
from rdm_fast.tools.report.snapshots import draw_response
from rdm_fast.tools.report.style import (
    Picture,
    canvas,
    label_left,
    legend_above,
    plain_numbers,
    png,
)

COLUMNS = 5
HEIGHT = 2.1
"""Inches of a row of panels."""


def compare(runs: Sequence[Run], *, responses: bool = True) -> Picture | None:
    """A panel of ranks for each run, and below a panel of its newest measured response, if any.

    Call it inside `style.applied()`. None if no run has ranks.
    """
    shown = [run for _, run in with_values(runs, "effective_rank/online")]
    if not shown:
        return None
    spectra = [(run, found[-1]) for run in shown if responses and (found := recorded(run))]
    upper, lower = (math.ceil(len(each) / COLUMNS) for each in (shown, spectra))
    columns = min(COLUMNS, len(shown))
    figure, axes = canvas(upper + lower, columns, HEIGHT * (upper + lower) + 0.4)
    ranks, below = axes[: upper * columns], axes[upper * columns :]
    for spare in (*ranks[len(shown) :], *below[len(spectra) :]):
        spare.remove()
    for each, run in zip(ranks, shown, strict=False):
        draw_ranks(each, run)
        each.set_title(run.label)
        each.set_ylim(bottom=0)
    for each, (run, record) in zip(below, spectra, strict=False):
        each.axhline(1, color="#333333", linewidth=0.8)
        draw_response(each, record, color="#009E73", marker="o", markersize=2.5, linestyle="none")
        each.set(title=run.label, xlabel="s / s_max")
        low, high = each.get_ylim()
        low, high = min(low, 0.2), max(high, 5)  # close to 1, all look alike
        each.set_ylim(low, high)
        if high < 100 * low:
            plain_numbers(each.yaxis)
    label_left(ranks[: len(shown)], "effective rank")
    label_left(below[: len(spectra)], "|g(s)| / |g(s_max)|")
    legend_above(figure, ranks[:1])
    return Picture(
        "branches",
        "Branches",
        "Top: effective rank of both branches' outputs and of the projections over training. "
        "Bottom: how much the asymmetric part of each run scales the directions of its input at "
        "the end, relative to the strongest: a predictor or online filter those of the online "
        "branch, any other those of the target.",
        "; ".join(run.label for run in shown),
        png(figure),
    )
