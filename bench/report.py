"""The results of campaigns as tables."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.markdown import replace_between, table

Json = dict[str, Any]
BASELINE = "svd"
UNMEASURED = "Nothing has been measured on a GPU yet."


def write_table(results: Path, readme: Path) -> None:
    """Put all results, one folder a campaign, between the markers of a Markdown file.

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
    """A section with all stages of one folder."""
    return "\n\n".join([f"### {name}", *(section(stage) for stage in stages)])


def section(stage: Json) -> str:
    """One stage: where, how, whether it passed, and what it found."""
    machine = stage["machine"]
    versions = f"torch {machine['torch']}, triton {machine['triton']}"
    driver = f"driver {machine['driver']}, " if machine["driver"] else ""
    where = f"{machine['device']}, {driver}{versions}, {machine['date']}, {machine['commit']}"
    commands = "; ".join(f"`{command['command']}`" for command in stage["commands"])
    verdict = "passed" if stage["passed"] else "**did not pass**: " + ", ".join(ends(stage))
    head = f"**{stage['stage']}**: {verdict}, {stage['seconds']:.0f} s. {where}. {commands}"
    return "\n\n".join([head, *SECTIONS[stage["stage"]](stage["measured"])])


def ends(stage: Json) -> list[str]:
    """How commands ended that did not end well."""
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
    header = ["op", "case", "implementation", "median", "IQR", "n", "as a graph", "of the floor"]
    return [
        table(
            header,
            [
                [
                    row["bench"].removeprefix("bench_"),
                    row["case"],
                    row["name"],
                    seconds(row["median_s"]),
                    seconds(row["iqr_s"]),
                    f"{row['rounds']} x {row['iterations']}",
                    seconds(row["graph_median_s"]) if "graph_median_s" in row else "",
                    f"{row['percent_of_floor']:.0f} %" if "percent_of_floor" in row else "",
                ]
                for row in measured
            ],
        )
    ]


def loss(measured: list[Json]) -> list[str]:
    """A row for each shape and filter, a column for each implementation, and the gain."""
    names = list(dict.fromkeys(row["name"] for row in measured))
    cases: dict[str, dict[str, Json]] = {}
    for row in measured:
        cases.setdefault(row["case"], {})[row["name"]] = row
    header = ["case", *names, "auto as a graph", f"{BASELINE} / auto"]
    lines = []
    for case, found in cases.items():
        shown = [timing(found[name]) if name in found else "" for name in names]
        auto = found.get("auto", {})
        graph = seconds(auto["graph_median_s"]) if "graph_median_s" in auto else ""
        gain = ""
        if auto and BASELINE in found:
            gain = f"{found[BASELINE]['median_s'] / auto['median_s']:.1f}"
        lines.append([case, *shown, graph, gain])
    n = f"{least(measured, 'rounds')} rounds or more"
    return [f"Median and inter-quartile range; {n}.", table(header, lines)]


def loader(measured: list[Json]) -> list[str]:
    """What images cost a step, and a row for each loader by itself."""
    waits = [row for row in measured if "data_percent" in row]
    alone = [row for row in measured if "images_per_s" in row]
    costs = [
        [
            row["case"],
            f"{row['loader']}, {row['workers']} workers",
            timing(row),
            seconds(row["unfed_s"]),
            f"{row['data_percent']:.1f} %",
        ]
        for row in waits
    ]
    speeds = [
        [
            row["bench"].removeprefix("bench_"),
            row["loader"],
            str(row["workers"]),
            f"{row['images_per_s']:,.0f}",
            timing(row),
            f"{row['cpu_ms_per_image']:.2f}",
        ]
        for row in alone
    ]
    return [
        f"Median and inter-quartile range; {least(measured, 'rounds')} rounds or more. The cost of "
        "data is the median of ratios within rounds.",
        table(["case", "fed by", "step", "with one batch", "cost of data"], costs),
        table(["images", "loader", "workers", "images/s", "epoch", "CPU ms an image"], speeds),
    ]


SHARES = ("percent_of_roof", "cpu_percent_of_roof")


def step(measured: list[Json]) -> list[str]:
    """A row for each case and method: time, share of the supervised roof, phases, memory."""
    phases = list(dict.fromkeys(phase for row in measured for phase in row["phases_ms"]))
    header = ["case", "method", "step", "n", "images/s", "of the roof, a view"]
    header += [*(f"{phase}, ms" for phase in phases), "peak, GiB"]
    lines = []
    for row in measured:
        memory = row["peak_memory_gib"]
        lines.append(
            [
                f"{row['case']} {row['precision']}",
                row["name"],
                timing(row),
                str(row["rounds"]),
                f"{row['images_per_s']:,.0f}",
                " / ".join(f"{row[share]:.0f} %" for share in SHARES if share in row),
                *(f"{row['phases_ms'][phase]:.3g}" for phase in phases),
                "" if memory is None else f"{memory:.1f}",
            ]
        )
    note = (
        "Median and inter-quartile range; on a CPU the second share is of CPU time. Phases are of "
        "the eager step, each waited for."
    )
    return [note, table(header, lines)]


def peers(measured: Json) -> list[str]:
    """What `bench.compare_peers` wrote, by file."""
    texts = []
    for report in measured.values():
        lightly = report["lightly"]
        texts.append(f"lightly {lightly}" if lightly else "lightly is not installed there")
        texts.append(peers_table(report["results"]))
    return texts


def peers_table(results: list[Json]) -> str:
    """The steps of every case, then the ratios of some of their times."""
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
            f"**{result['case']}**, n = {result['n']}, load average {result['load_average']:.1f}",
            table(["step", "ms", "CPU ms", "images/s"], steps),
            table(["one's time over the other's", "ratio", "of CPU time"], ratios),
            *result["skipped"],
        ]
    return "\n\n".join(texts)


def peer_times(row: Json) -> list[str]:
    """Median and inter-quartile range, ms: by the clock, and by CPU time where that is known."""
    pairs = [("median_s", "iqr_s"), ("cpu_median_s", "cpu_iqr_s")]
    return [
        f"{1e3 * row[median]:.1f} ± {1e3 * row[iqr]:.1f}" if median in row else ""
        for median, iqr in pairs
    ]


def learning(measured: Json) -> list[str]:
    """What `bench.learning` wrote: a row for each run, as far as it went."""
    texts = []
    for report in measured.values():
        lines = []
        for name, run in report["runs"].items():
            last, evaluation = run.get("last", {}), run.get("evaluation", {})
            ranks = [last.get(f"effective_rank/{branch}") for branch in ("online", "target")]
            knn = run["knn_top1_by_step"]
            lines.append(
                [
                    name,
                    f"{last['epoch']:.1f}" if last else "",
                    f"{knn[-1][1]:.2f}" if knn else "",
                    f"{evaluation['top1']:.2f}" if evaluation else "",
                    " / ".join(f"{rank:.1f}" for rank in ranks if rank is not None),
                    f"{run['images_per_s']:,.0f}" if last else "",
                    str(run.get("n", "")),
                ]
            )
        header = ["run", "epochs", "kNN top-1, %", "linear top-1, %"]
        header += ["effective rank online / target", "images/s, median", "n"]
        texts.append(f"Of {report['epochs']} epochs.\n\n{table(header, lines)}")
    return texts


def least(rows: Iterable[Json], key: str) -> int:
    return min((row[key] for row in rows), default=0)


def timing(row: Json) -> str:
    return f"{seconds(row['median_s'])} ± {seconds(row['iqr_s'])}"


def seconds(value: float) -> str:
    """A time in its unit, three digits."""
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
