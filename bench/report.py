"""The results of campaigns as tables."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.markdown import Columns, replace_between, table, table_of

Json = dict[str, Any]
BASELINE = "svd"
UNMEASURED = "Nothing has been measured on a GPU yet."


def write_table(results: Path, readme: Path) -> None:
    """Write all results, a folder for each campaign, between the markers of a Markdown file.

    Raises:
        ValueError: a result is of a smoke run, which measures nothing.
    """
    campaigns = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        commands = [read(path) for path in sorted(folder.glob("*.jsonl"))]
        if smoke := [head["campaign"] for head, _ in commands if head["smoke"]]:
            raise ValueError(f"{folder} holds results of --smoke ({', '.join(smoke)}): delete them")
        if commands:
            sections = [text for head, stages in commands for text in command(head, stages)]
            campaigns += [f"### {folder.name}", *sections]
    replace_between(readme, "results", "\n\n".join(campaigns) or UNMEASURED)


def read(path: Path) -> tuple[Json, list[Json]]:
    """The first line of a command's file, and its stages with their rows.

    A stage without an end was under way when the machine was lost, perhaps in the midst of a line.
    """
    head, *lines = path.read_text("utf-8").splitlines()
    stages: list[Json] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "stage" in row:
            stages.append(row | {"rows": [], "status": "lost", "seconds": 0.0, "tail": ""})
        elif "ended" in row:
            stages[-1] |= row
        else:
            stages[-1]["rows"].append(row)
    return json.loads(head), stages


def command(head: Json, stages: list[Json]) -> list[str]:
    """The machine of a command, and of each stage its verdict and results."""
    machine = head["machine"]
    versions = f"torch {machine['torch']}, triton {machine['triton']}"
    driver = f"driver {machine['driver']}, " if machine["driver"] else ""
    where = f"{machine['device']}, {driver}{versions}, {machine['date']}, {machine['commit']}"
    texts = [f"**{head['campaign']}**: {where}"]
    for stage in stages:
        end = ENDS.get(stage["status"], f"**exit status {stage['status']}**")
        texts.append(f"**{stage['stage']}**: {end}, {stage['seconds']:.0f} s. `{stage['command']}`")
        rows = [row for row in stage["rows"] if "test" not in row]
        texts += outcomes([row for row in stage["rows"] if "test" in row])
        texts += SECTIONS[stage["stage"]](rows) if rows else []
    return texts


def outcomes(tests: list[Json]) -> list[str]:
    """Numbers of tests by outcome, and names of failed ones."""
    if not tests:
        return []
    counts = Counter(test["outcome"] for test in tests)
    tally = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "skipped", "failed"))
    failed = [test["test"] for test in tests if test["outcome"] == "failed"]
    return [tally + "".join(f"\n- {name}" for name in failed)]


def accuracy(measured: list[Json]) -> list[str]:
    """A table for each engine and dtype: a row for each filter, a column for each spectrum."""
    tables: dict[str, dict[str, list[str]]] = {}
    for row in measured:
        title = f"engine={row['engine']}, {row['dtype']} {tuple(row['shape'])}"
        tables.setdefault(title, {}).setdefault(row["filter"], []).append(row["text"])
    texts = []
    for title, cells in tables.items():
        spectra = list(dict.fromkeys(row["spectrum"] for row in measured))
        width = max(map(len, cells.values()))
        lines = [[name, *found, *[""] * (width - len(found))] for name, found in cells.items()]
        texts.append(f"{title}:\n\n{table(['filter', *spectra[:width]], lines)}")
    faults = [f"{row['filter']} of {row['spectrum']}: {row['fault']}"
              for row in measured if row["fault"]]  # fmt: skip
    return texts + ["Not accurate enough:" + "".join(f"\n- {f}" for f in faults)] * bool(faults)


def prototypes(measured: list[Json]) -> list[str]:
    """A row for each loss of DINO and SwAV and dtype of the logits' factors."""
    columns: Columns = {"loss": lambda row: row["case"], "factors": lambda row: row["dtype"]}
    errors = {"q": "q", "gradient": "gradient", "error of the loss": "loss"}
    columns |= {title: lambda row, key=key: f"{row[key]:.0e}" for title, key in errors.items()}
    return [table_of(measured, columns)]


def profiles(measured: list[Json]) -> list[str]:
    """A row for each filter: launches, and the three slowest kernels."""
    columns: Columns = {
        "case": lambda row: row["case"],
        "launches": lambda row: str(row["launches"]),
        "in all": lambda row: seconds(1e-6 * row["us"]),
        "slowest, calls and time": lambda row: "; ".join(
            f"{name} {count} x {seconds(1e-6 * us)}" for name, count, us in row["kernels"][:3]
        ),
    }
    return [table_of(measured, columns)]


def kernels(measured: list[Json]) -> list[str]:
    """A row for each case and implementation."""
    columns: Columns = {
        "op": lambda row: row["bench"].removeprefix("bench_"),
        "case": lambda row: row["case"],
        "implementation": lambda row: row["name"],
        "median": lambda row: seconds(row["median_s"]),
        "IQR": lambda row: seconds(row["iqr_s"]),
        "n": lambda row: f"{row['rounds']} x {row['iterations']}",
        "as a graph": graph_time,
        "of the floor": lambda row: percent(row, "percent_of_floor"),
    }
    return [table_of(measured, columns)]


def loss(measured: list[Json]) -> list[str]:
    """A row for each shape and filter, a column for each implementation, and the gain."""
    names = list(dict.fromkeys(row["name"] for row in measured))
    cases: dict[str, dict[str, Json]] = {}
    for row in measured:
        cases.setdefault(row["case"], {})[row["name"]] = row
    lines = []
    for case, found in cases.items():
        shown = [timing(found[name]) if name in found else "" for name in names]
        auto, gain = found.get("auto", {}), ""
        if auto and BASELINE in found:
            gain = f"{found[BASELINE]['median_s'] / auto['median_s']:.1f}"
        lines.append([case, *shown, graph_time(auto), gain])
    n = f"{least(measured, 'rounds')} rounds or more"
    header = ["case", *names, "auto as a graph", f"{BASELINE} / auto"]
    return [f"Median and inter-quartile range; {n}.", table(header, lines)]


def views(measured: list[Json]) -> list[str]:
    """The time to make views, and the cost of data in a step."""
    costs: Columns = {
        "case": lambda row: row["case"],
        "fed by": lambda row: f"{row['loader']}, {row['workers']} workers",
        "step": timing,
        "with one batch": lambda row: seconds(row["unfed_s"]),
        "cost of data": lambda row: f"{row['data_percent']:.1f} %",
    }
    fed = [row for row in measured if "data_percent" in row]
    made = [row for row in measured if row not in fed]
    return [*(kernels(made) if made else []), *([table_of(fed, costs)] if fed else [])]


def step(measured: list[Json]) -> list[str]:
    """A row for each case and method: time, share of the supervised roof, phases, memory."""
    shares = ("percent_of_roof", "cpu_percent_of_roof")
    phases = list(dict.fromkeys(phase for row in measured for phase in row["phases_ms"]))
    columns: Columns = {
        "case": lambda row: f"{row['case']} {row['precision']}",
        "method": lambda row: row["name"],
        "cuDNN": lambda row: row["cudnn"],
        "step": timing,
        "n": lambda row: str(row["rounds"]),
        "images/s": lambda row: f"{row['images_per_s']:,.0f}",
        "of the roof, a view": lambda row: " / ".join(percent(row, k) for k in shares if k in row),
    }
    for phase in phases:
        columns[f"{phase}, ms"] = lambda row, phase=phase: f"{row['phases_ms'][phase]:.3g}"
    memory = "peak_memory_gib"
    columns["peak, GiB"] = lambda row: "" if row[memory] is None else f"{row[memory]:.1f}"
    note = (
        "Median and inter-quartile range. The roof has cuDNN's fastest algorithms; on a CPU there "
        "is no cuDNN, and the second share is of CPU time. Phases are of the eager step, each "
        "waited for."
    )
    return [note, table_of(measured, columns)]


def peers(measured: list[Json]) -> list[str]:
    """The rows of `bench.compare_peers`, a case each."""
    lightly = measured[0]["lightly"]
    version = f"lightly {lightly}" if lightly else "lightly is not installed there"
    return [version, peers_table(measured)]


def peers_table(results: list[Json]) -> str:
    """The steps of every case, then ratios of their times."""
    texts = []
    for result in results:
        steps = [
            [name, *peer_times(row), f"{row['images_per_s']:,.0f}"]
            for name, row in result["steps"].items()
        ]
        ratios = [
            [title, *(f"{values[key]:.2f}" if key in values else "" for key in ("wall", "cpu"))]
            for title, values in result["ratios"].items()
        ]
        texts += [
            f"**{result['case']}**, n = {result['n']}, load average {result['load_average']:.1f}, "
            f"cuDNN: {result['cudnn']}",
            table(["step", "ms", "CPU ms", "images/s"], steps),
            table(["one's time over the other's", "ratio", "of CPU time"], ratios),
            *result["skipped"],
        ]
    return "\n\n".join(texts)


def peer_times(row: Json) -> list[str]:
    """Median and inter-quartile range in ms, by the clock and, if measured, of CPU time."""
    pairs = [("median_s", "iqr_s"), ("cpu_median_s", "cpu_iqr_s")]
    return [
        f"{1e3 * row[median]:.1f} ± {1e3 * row[iqr]:.1f}" if median in row else ""
        for median, iqr in pairs
    ]


def learning(measured: list[Json]) -> list[str]:
    """The rows of `bench.learning`: the last of each run, as far as it went."""

    def ranks(run: Json) -> str:
        found = [run["last"].get(f"effective_rank/{name}") for name in ("online", "target")]
        return " / ".join(f"{rank:.1f}" for rank in found if rank is not None)

    columns: Columns = {
        "run": lambda run: run["run"],
        "images": lambda run: run["data"],
        "epochs": lambda run: f"{run['last']['epoch']:.1f} of {run['epochs']}",
        "kNN top-1, %": lambda run: f"{knn[-1][1]:.2f}" if (knn := run["knn_top1_by_step"]) else "",
        "linear top-1, %": lambda run: (
            f"{run['evaluation']['top1']:.2f}" if "evaluation" in run else ""
        ),
        "effective rank online / target": ranks,
        "images/s, median": lambda run: f"{run['images_per_s']:,.0f}",
        "n": lambda run: str(run["n"]),
    }
    return [table_of([*{run["run"]: run for run in measured if "last" in run}.values()], columns)]


# ---- cells -------------------------------------------------------------------------------------


def least(rows: Iterable[Json], key: str) -> int:
    return min((row[key] for row in rows), default=0)


def percent(row: Json, key: str) -> str:
    return f"{row[key]:.0f} %" if key in row else ""


def graph_time(row: Json) -> str:
    if "graph_error" in row:
        return "failed"
    return seconds(row["graph_median_s"]) if "graph_median_s" in row else ""


def timing(row: Json) -> str:
    return f"{seconds(row['median_s'])} ± {seconds(row['iqr_s'])}"


def seconds(value: float) -> str:
    """A time in a suitable unit, with three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


ENDS = {0: "passed", None: "**time ran out**", "lost": "**the machine was lost**"}
SECTIONS: dict[str, Callable[[list[Json]], list[str]]] = {
    **dict.fromkeys(("gpu", "kernels", "memory"), outcomes),
    **dict.fromkeys(("library", "blocks"), kernels),
    "profile": profiles,
    "loss": loss,
    "step": step,
    "peers": peers,
    "views": views,
    **dict.fromkeys(("large", "wide"), accuracy),
    "prototypes": prototypes,
    "learning": learning,
}
