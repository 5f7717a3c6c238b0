"""The page: a summary, the figures and the settings, in one file that fetches nothing."""

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdm_fast.run.folder import version
from rdm_fast.tools.report.read import Run, differences
from rdm_fast.tools.report.style import Picture

TEMPLATE = Path(__file__).with_name("page.html")
NONE = "–"  # noqa: RUF001  for a missing value


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    numbers: frozenset[int] = frozenset()
    """Columns that are right-aligned, as numbers."""


def render(runs: Sequence[Run], pictures: Sequence[Picture]) -> str:
    """The page as HTML text.

    Args:
        runs: in the order of the figures' colors.
        pictures: in the order of the page, below the summary.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    return (
        environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
            title=f"Report on {title}",
            lead=_lead(runs),
            notes=[(run.label, note) for run in runs for note in run.notes],
            summary=summary(runs),
            sections=[_section(picture) for picture in pictures],
            differing=_differing(runs),
            environment=_environment(runs),
            configuration=_configuration(runs),
            runs_known=sum(run.config is not None for run in runs),
            version=version(),
        )
        + "\n"
    )


def _lead(runs: Sequence[Run]) -> str:
    data = dict.fromkeys(run.config.data.name for run in runs if run.config)
    titles = dict.fromkeys(run.title for run in runs)
    trained = "; ".join(titles) if len(titles) <= 3 else f"{len(titles)} configurations"
    return f"{trained}. Data: {', '.join(data) or 'unknown'}."


def _section(picture: Picture) -> dict[str, Any]:
    width, height = struct.unpack(">II", picture.png[16:24] or bytes(8))  # of the IHDR chunk
    png = base64.b64encode(picture.png).decode()
    return {**vars(picture), "png": png, "width": width, "height": height}


# ---- tables ------------------------------------------------------------------------------------


def summary(runs: Sequence[Run]) -> Table:
    """One row for each run."""
    columns = [
        "run", "method", "state", "epochs", "loss", "kNN top-1 (%)", "linear top-1 (%)",
        "effective rank, online", "target", "projec\u00adtions", "rank differ\u00adence",
        "images/s", "time",
    ]  # fmt: skip
    caption = (
        "Last logged values; effective ranks are of the last logged batch. Linear probe: of the "
        "newest evaluation. Images/s: median. Time: in training steps, on the device below."
    )
    return Table(caption, columns, [_summary(run) for run in runs], frozenset(range(3, 13)))


def _summary(run: Run) -> list[str]:
    ranks = [f"effective_rank/{branch}" for branch in ("online", "target", "projection")]
    last = {key: run.series(key).last for key in ("epoch", "loss", "knn_top1", *ranks)}
    difference = run.series("rank_difference").last
    epochs = f" of {run.config.optim.epochs}" if run.config else ""
    done = last["epoch"]
    return [
        run.label,
        run.title,
        run.state,
        NONE if done is None else f"{done:.4g}" + (epochs if run.state != "finished" else ""),
        number(last["loss"], 3),
        number(last["knn_top1"], 1),
        number(run.evaluation.get("top1"), 1),
        *(number(last[key], 1) for key in ranks),
        number(difference, 2),
        number(run.median_speed(), 0),
        clock(run.seconds()),
    ]


def number(value: Any, digits: int) -> str:
    """A value with that many decimals, or a dash if there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # no -0.00


def clock(seconds: float | None) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds is None:
        return NONE
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _differing(runs: Sequence[Run]) -> Table:
    rows = [[name, *map(_cell, values)] for name, values in differences(runs).items()]
    labels = [run.label for run in runs]
    return Table("Settings that differ between the runs.", ["setting", *labels], rows)


def _configuration(runs: Sequence[Run]) -> Table:
    known = [run for run in runs if run.config]
    names = dict.fromkeys(name for run in known for name in run.settings)
    rows = [[name, *(_cell(run.settings.get(name)) for run in known)] for name in names]
    return Table("As in config.yaml.", ["setting", *(run.label for run in known)], rows)


def _environment(runs: Sequence[Run]) -> Table:
    """Versions and machine; runs that share them share a column."""
    names = (
        "device", "world_size", "global_batch", "precision", "loader", "engine", "torch",
        "torchvision", "triton", "python", "rdm_fast", "git",
    )  # fmt: skip
    shared: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        values = tuple(_cell(run.environment.get(name)) for name in names)
        shared.setdefault(values, []).append(run.label)
    rows = [
        [name.replace("_", " "), *(values[i] for values in shared)] for i, name in enumerate(names)
    ]
    heads = ["all runs"] if len(shared) == 1 else [", ".join(group) for group in shared.values()]
    return Table("Where the runs were last started.", ["environment", *heads], rows)


def _cell(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
