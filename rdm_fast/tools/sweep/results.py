"""Results of a sweep, one row per filter, as a Markdown table and as a figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rdm_fast.tools.report.page import number
from rdm_fast.tools.report.read import Run, describe_filter
from rdm_fast.tools.report.style import (
    ONLINE,
    TARGET,
    Picture,
    canvas,
    legend_above,
    plain_numbers,
    png,
)
from rdm_fast.tools.sweep.grid import CONTROL, prediction
from rdm_fast.tools.sweep.queue import Failure

RANKS = ("online", "target", "projection")
BLUES = ("#08306B", "#2171B5", "#4CA3DD", "#1B9E9E", "#74C4A8")
REDS = ("#7F1D00", "#D55E00", "#F0893A", "#D9A400")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


@dataclass(frozen=True)
class Row:
    """One run of a sweep. Values are of the last logged batch; None if there is none."""

    name: str
    filter: str
    """What distinguishes the run: its filter, or method."""
    predicted: str
    """Sign of the rank difference that RDM predicts: positive, negative or zero."""
    state: str
    knn_top1: float | None
    """Percent."""
    probe_top1: float | None
    """Percent, with `protocol`."""
    protocol: str | None
    effective_rank: dict[str, float | None]
    """Of both branches' outputs and of the projections."""
    rank_difference: float | None
    rank_difference_lowest: float | None
    """Of all logged batches."""
    seconds: float | None
    """Spent in training steps."""
    failure: str | None


def row(run: Run, name: str, failure: Failure | None, title: str = "") -> Row:
    """The results of one run, whose title may be other than its filter."""
    difference = run.series("rank_difference")
    finite = [value for value in difference.values if math.isfinite(value)]
    config = run.config
    spectral = config is not None and config.predictor == "spectral"
    described = describe_filter(config.filter) if config and spectral else "no filter, symmetric"
    return Row(
        name=name,
        filter=title or described,
        predicted=prediction(config) if config else "unknown",
        state=run.state,
        knn_top1=run.evaluation.get("knn_top1", run.series("knn_top1").last),
        probe_top1=run.evaluation.get("top1"),
        protocol=run.evaluation.get("protocol"),
        effective_rank={key: run.series(f"effective_rank/{key}").last for key in RANKS},
        rank_difference=difference.last,
        rank_difference_lowest=min(finite, default=None),
        seconds=run.seconds(),
        failure=failure.sentence if failure else None,
    )


# ---- table -----------------------------------------------------------------------------------


def markdown(rows: Sequence[Row], conditions: str, kind: str = "filter") -> str:
    """The table, followed by its conditions.

    Args:
        rows: in the order of the sweep.
        conditions: from `conditions`.
        kind: what distinguishes the runs, filter or method.
    """
    lines = [
        f"| {kind} | RDM predicts | kNN top-1 (%) | linear top-1 (%) | effective rank, online "
        "| target | projections | rank difference, last | lowest | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        ranks = [number(each.effective_rank[key], 1) for key in RANKS]
        cells = [
            each.filter,
            each.predicted,
            number(each.knn_top1, 1),
            number(each.probe_top1, 1),
            *ranks,
            number(each.rank_difference, 2),
            number(each.rank_difference_lowest, 2),
            number(each.seconds, 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"{each.filter}: {each.failure}" for each in rows if each.failure]
    notes = [f"Not complete: {'; '.join(failed)}."] if failed else []
    return "\n".join([*lines, "", conditions, *notes]) + "\n"


def conditions(runs: Mapping[str, Run], threads: int, jobs: int) -> str:
    """How the numbers were measured, in one paragraph."""
    known = [run for run in runs.values() if run.config]
    if not known:
        return "These runs left no configuration."
    run, config = known[0], known[0].config
    assert config is not None
    environment = run.environment
    protocols = {run.evaluation["protocol"] for run in known if "protocol" in run.evaluation}
    epochs = "1 epoch" if config.optim.epochs == 1 else f"{config.optim.epochs} epochs"
    return (
        f"{config.data.name}, {epochs}, batch {config.optim.global_batch}, seed {config.seed}, one "
        f"run each; {jobs} at a time with {threads} thread(s) each. Device: "
        f"{environment.get('device', 'unknown')}; torch {environment.get('torch', 'unknown')}. "
        "Effective ranks and rank difference (target minus online) are of the last logged batch, "
        "lowest of all logged batches; kNN and linear probe "
        f"({', '.join(sorted(protocols)) or 'none yet'}) on the test images; seconds are spent in "
        "training steps."
    )


# ---- figure ----------------------------------------------------------------------------------


def figure(rows: Sequence[Row], runs: Mapping[str, Run]) -> Picture | None:
    """Final ranks and accuracy, and the rank difference over time; None if no run has ranks.

    Call it inside `style.applied()`."""
    shown = [each for each in rows if each.rank_difference is not None]
    if not shown:
        return None
    drawn, all_axes = canvas(2, 2, 3.6 + 0.3 * len(shown), width_ratios=(3, 2))
    ranks, accuracy, left, right = all_axes
    _ranks(ranks, shown)
    _accuracy(accuracy, shown)
    grid = left.get_gridspec()
    left.remove(), right.remove()
    _over_time(drawn.add_subplot(grid[1, :]), shown, runs)
    legend_above(drawn, [ranks, accuracy])
    return Picture(
        "sweep",
        "Sweep",
        "Top left: effective rank of the online (circle) and target branch (diamond) at the end; "
        "the line between them is the rank difference. Dashed: the control's projections. Top "
        "right: accuracy on the test images. Bottom: rank difference over training.",
        "; ".join(f"{each.filter}: rank difference {each.rank_difference:.2f}" for each in shown),
        png(drawn),
    )


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    """Blues for the online branch, reds for the target, gray for no filter."""
    counts = {"online": 0, "target": 0}
    found = {}
    for each in rows:
        branch = each.filter.partition(" ")[0]
        if branch in counts:
            shades = BLUES if branch == "online" else REDS
            found[each.name] = shades[counts[branch] % len(shades)]
            counts[branch] += 1
        else:
            found[each.name] = "#333333"
    return found


def _ranks(axes: Any, rows: Sequence[Row]) -> None:
    for y, each in enumerate(rows):
        online, target = each.effective_rank["online"], each.effective_rank["target"]
        if online is None or target is None:
            continue
        first = {"label": "online branch"} if y == 0 else {}
        second = {"label": "target branch"} if y == 0 else {}
        axes.plot([online, target], [y, y], color="#B5B5B5", linewidth=3, zorder=1.5)
        axes.plot([online], [y], "o", color=ONLINE, markersize=7, **first)
        axes.plot([target], [y], "D", color=TARGET, markersize=6, **second)
    control = next((each for each in rows if each.name == CONTROL), None)
    if control and control.effective_rank["projection"]:
        level = control.effective_rank["projection"]
        axes.axvline(level, color="#333333", linewidth=1, linestyle=(0, (5, 3)), zorder=1)
    axes.set_yticks(range(len(rows)), [each.filter for each in rows])
    axes.set(xscale="log", xlabel="effective rank", ylim=(len(rows) - 0.4, -0.6))
    plain_numbers(axes.xaxis)


def _accuracy(axes: Any, rows: Sequence[Row]) -> None:
    kinds = (
        ("knn_top1", "kNN top-1", "s", "#009E73"),
        ("probe_top1", "linear top-1", "^", "#4D4D4D"),
    )
    for key, label, marker, color in kinds:
        points = [(getattr(each, key), y) for y, each in enumerate(rows)]
        known = [point for point in points if point[0] is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker, color=color, label=label, markersize=6)
    axes.set_yticks(range(len(rows)), [])
    axes.set(xlabel="top-1 accuracy (%)", ylim=(len(rows) - 0.4, -0.6))


def _over_time(axes: Any, rows: Sequence[Row], runs: Mapping[str, Run]) -> None:
    from matplotlib.ticker import StrMethodFormatter

    axes.axhline(0, color="#333333", linewidth=0.8)
    for i, (name, color) in enumerate(_colors(rows).items()):
        series = runs[name].series("rank_difference")
        label = next(each.filter for each in rows if each.name == name)
        style = {"color": color, "linestyle": DASHES[i % len(DASHES)], "label": label}
        axes.plot(
            series.epochs, series.values, marker="o" if len(series.epochs) < 3 else None, **style
        )
    axes.set(xlabel="epoch", ylabel="rank difference", yscale="symlog")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=2.6)
