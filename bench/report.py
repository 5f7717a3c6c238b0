"""The results of campaigns as tables."""

import json
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
        stages = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
        if smoke := [stage["stage"] for stage in stages if stage["smoke"]]:
            raise ValueError(f"{folder} holds results of --smoke ({', '.join(smoke)}): delete them")
        if stages:
            campaigns.append(campaign(folder.name, stages))
    replace_between(readme, "results", "\n\n".join(campaigns) or UNMEASURED)


def campaign(name: str, stages: list[Json]) -> str:
    """A section with all stages of a folder."""
    return "\n\n".join([f"### {name}", *(section(stage) for stage in stages)])


def section(stage: Json) -> str:
    """One stage: machine, commands, verdict and results."""
    machine = stage["machine"]
    versions = f"torch {machine['torch']}, triton {machine['triton']}"
    driver = f"driver {machine['driver']}, " if machine["driver"] else ""
    where = f"{machine['device']}, {driver}{versions}, {machine['date']}, {machine['commit']}"
    commands = "; ".join(f"`{command['command']}`" for command in stage["commands"])
    verdict = "passed" if stage["passed"] else "**did not pass**: " + ", ".join(ends(stage))
    head = f"**{stage['stage']}**: {verdict}, {stage['seconds']:.0f} s. {where}. {commands}"
    return "\n\n".join([head, *SECTIONS[stage["stage"]](stage["measured"])])


def ends(stage: Json) -> list[str]:
    """How the failed commands ended."""
    return [
        "time ran out" if command["status"] is None else f"exit status {command['status']}"
        for command in stage["commands"]
        if command["status"] != 0
    ]


def correctness(measured: Json) -> list[str]:
    return [
        f"{name}: {run['passed']} passed, {run['skipped']} skipped, {len(run['failed'])} failed"
        + "".join(f"\n- {test}" for test in run["failed"])
        for name, run in measured.items()
    ]


def accuracy(measured: Json) -> list[str]:
    texts = []
    for numbers in measured.values():
        faults = "".join(f"\n- {fault}" for fault in numbers["faults"])
        texts += [numbers["markdown"], f"Not accurate enough:{faults}" if faults else ""]
    return [text for text in texts if text]


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


def loader(measured: list[Json]) -> list[str]:
    """The cost of data in a step, and a row for each loader by itself."""
    costs: Columns = {
        "case": lambda row: row["case"],
        "fed by": lambda row: f"{row['loader']}, {row['workers']} workers",
        "step": timing,
        "with one batch": lambda row: seconds(row["unfed_s"]),
        "cost of data": lambda row: f"{row['data_percent']:.1f} %",
    }
    speeds: Columns = {
        "images": lambda row: row["bench"].removeprefix("bench_"),
        "loader": lambda row: row["loader"],
        "workers": lambda row: str(row["workers"]),
        "images/s": lambda row: f"{row['images_per_s']:,.0f}",
        "epoch": timing,
        "CPU ms an image": lambda row: f"{row['cpu_ms_per_image']:.2f}",
    }
    return [
        f"Median and inter-quartile range; {least(measured, 'rounds')} rounds or more. The cost of "
        "data is the median of ratios within rounds.",
        table_of([row for row in measured if "data_percent" in row], costs),
        table_of([row for row in measured if "images_per_s" in row], speeds),
    ]


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


def peers(measured: Json) -> list[str]:
    """The output of `bench.compare_peers`, by file."""
    texts = []
    for report in measured.values():
        lightly = report["lightly"]
        texts.append(f"lightly {lightly}" if lightly else "lightly is not installed there")
        texts.append(peers_table(report["results"]))
    return texts


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


def learning(measured: Json) -> list[str]:
    """The output of `bench.learning`: a row for each run, as far as it went."""

    def ranks(run: Json) -> str:
        found = [run["last"].get(f"effective_rank/{name}") for name in ("online", "target")]
        return " / ".join(f"{rank:.1f}" for rank in found if rank is not None)

    columns: Columns = {
        "run": lambda run: run["name"],
        "epochs": lambda run: f"{run['last']['epoch']:.1f}" if run["last"] else "",
        "kNN top-1, %": lambda run: f"{run['knn'][-1][1]:.2f}" if run["knn"] else "",
        "linear top-1, %": lambda run: f"{run['top1']:.2f}" if run["top1"] else "",
        "effective rank online / target": ranks,
        "images/s, median": lambda run: f"{run['images_per_s']:,.0f}" if run["last"] else "",
        "n": lambda run: str(run.get("n", "")),
    }
    texts = []
    for report in measured.values():
        runs = [
            {"last": {}, **run, "name": name, "knn": run["knn_top1_by_step"],
             "top1": run.get("evaluation", {}).get("top1")}
            for name, run in report["runs"].items()
        ]  # fmt: skip
        texts.append(f"Of {report['epochs']} epochs.\n\n{table_of(runs, columns)}")
    return texts


# ---- cells -------------------------------------------------------------------------------------


def least(rows: Iterable[Json], key: str) -> int:
    return min((row[key] for row in rows), default=0)


def percent(row: Json, key: str) -> str:
    return f"{row[key]:.0f} %" if key in row else ""


def graph_time(row: Json) -> str:
    return seconds(row["graph_median_s"]) if "graph_median_s" in row else ""


def timing(row: Json) -> str:
    return f"{seconds(row['median_s'])} ± {seconds(row['iqr_s'])}"


def seconds(value: float) -> str:
    """A time in a suitable unit, with three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


SECTIONS: dict[str, Callable[[Any], list[str]]] = {
    "correctness": correctness,
    "accuracy": accuracy,
    "kernels": kernels,
    "loss": loss,
    "loss-large": loss,
    "loss-huge": loss,
    "step": step,
    "step-imagenet": step,
    "peers": peers,
    "peers-imagenet": peers,
    "augment": kernels,
    "loader": loader,
    "learning": learning,
}
