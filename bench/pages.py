"""The numbers on the pages by name: where they stand, how they are measured, how they are shown."""

import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import bench.measured as m
from bench.cutoff import CUTOFF, measure_cutoff
from bench.measured import Column, Runs, Values
from bench.methods import BRIEF, METHODS, SHOWN, draw_methods, measure_filtered, measure_methods
from bench.vit import measure_vit

Record = dict[str, Any]
"""Values with machine and seeds, as in bench/results/NAME.json."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Numbers that one command makes."""

    blocks: Mapping[str, Callable[[Record], str] | None]
    """Pages, and the text there made of a record; None for a text written by hand."""
    command: str
    why: str = ""
    """Why `--check` leaves them out; empty if it does not."""
    measure: Callable[[Runs, bool], Values] | None = None
    """From runs, and whether the values of `--quick` suffice; raises RuntimeError on failure."""
    seeds: Sequence[int] = (0,)
    quick: bool = False
    columns: Mapping[str, Column] = field(default_factory=dict)
    """Empty if there are no values: `measure` only fails or does not."""
    draw: Callable[[Runs], object] | None = None
    """Draws the figures beside the table, from the same runs."""


# ---- text --------------------------------------------------------------------------------------


def cell(values: Sequence[float], decimals: int) -> str:
    """Mean, and from two values on the standard deviation."""
    mean = f"{round(statistics.mean(values), decimals) + 0.0:.{decimals}f}"  # no -0.00
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"


def table(corner: str, columns: Mapping[str, Column], record: Record) -> str:
    """A row for each row of the values, with n, if any number is a mean."""
    rows: Values = record["values"]
    counts = {name: len(next(iter(row.values()))) for name, row in rows.items()}
    with_n = max(counts.values()) > 1
    lines = ["| " + " | ".join([corner, *(["n"] if with_n else []), *columns]) + " |"]
    lines.append("|---|" + "---:|" * (len(columns) + with_n))
    for name, row in rows.items():
        cells = [name, str(counts[name])] if with_n else [name]
        cells += [cell(row[key], columns[key].decimals) if key in row else "" for key in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def where(record: Record) -> str:
    """Seeds, machine and versions."""
    machine, n = record["machine"], len(record["seeds"])
    how = (
        f"Mean ± standard deviation of n seeds from {record['seeds'][0]} on" if n > 1 else "One run"
    )
    return f"{how}; {machine['device']}, one thread, torch {machine['torch']}, {machine['date']}."


def paragraph(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def claim(record: Record) -> str:
    """RDM's prediction, and how many filters fulfil it."""
    rows: Values = record["values"]
    filters = [row for name, row in rows.items() if name != m.CONTROL]
    positive = sum(row["lowest"][0] > 0 for row in filters)
    ranks = [row["projections"][0] for row in filters]
    count = "All" if positive == len(filters) else f"{positive} of the"
    return paragraph(
        f"**The paper's claim, on digits.** {count} {len(filters)} filters that RDM recommends "
        "keep the rank difference positive at every logged step. The projections end "
        f"with an effective rank of {min(ranks):.0f} to {max(ranks):.0f}, against "
        f"{rows[m.CONTROL]['projections'][0]:.1f} unfiltered (`rdm sweep digits_rdm_simsiam`, "
        "seed 0; [table](docs/sweep.md)):"
    )


def methods(record: Record) -> str:
    """Which methods have RDM's rank difference, and their accuracies."""
    rows: Values = {title: record["values"][title] for title in SHOWN.values()}
    positive = [title for title, row in rows.items() if min(row["lowest"]) > 0]
    seeds = len(record["seeds"])
    text = paragraph(
        f"**The methods, on digits.** {', '.join(positive[:-1])} and {positive[-1]} have a "
        f"positive rank difference at every logged step of {seeds} seeds, SwAV and DINO without a "
        "predictor and after the softmax. The symmetric control has none, and collapses (`rdm "
        "sweep digits_methods`; [ablations](docs/sweep.md#sweeps-over-methods)). Projections: "
        "their effective rank."
    )
    columns = {key: METHODS[key] for key in BRIEF}
    brief = table("method", columns, record | {"values": rows})
    return "\n\n".join([text, brief, paragraph(where(record)), RANKS_PICTURE])


def shown(
    corner: str, columns: Mapping[str, Column], before: str = "", after: str = ""
) -> Callable[[Record], str]:
    """The table of a record, and where it was measured."""

    def text(record: Record) -> str:
        last = paragraph(f"{where(record)} {after}".strip())
        return "\n\n".join(filter(None, [before, table(corner, columns, record), last]))

    return text


def passes(*arguments: str) -> Callable[[Runs, bool], Values]:
    """No values: this program fails where a bound is broken, or a page has another table."""

    def measure(runs: Runs, quick: bool) -> Values:
        runs.call(*arguments)
        return {}

    return measure


TIMING = "times need an idle machine"
TEST_IMAGES = "There are 397 test images, so one image is 0.25 points."
PICTURE = "![Effective rank and rank difference of every filter](sweep.png)"
RANKS_PICTURE = (
    "![Effective ranks of both branches of five methods during training](docs/methods_ranks.png)"
)
METHODS_PICTURE = (
    "![Effective ranks of both branches, and the response, of every method](methods.png)"
)
ENTRIES = {
    "digits": Entry(
        blocks={"README.md": shown("digits, 60 epochs", m.DIGITS, after=TEST_IMAGES)},
        command="rdm train digits_rdm_simsiam [--sigma 0] --seed 0 to 4, and rdm eval",
        measure=m.measure_digits, seeds=m.SEEDS, columns=m.DIGITS, quick=True, draw=m.draw_digits,
    ),
    "sweep": Entry(
        blocks={"README.md": claim, "docs/sweep.md": shown("filter", m.SWEEP, PICTURE)},
        command="rdm sweep digits_rdm_simsiam",
        measure=m.measure_sweep, columns=m.SWEEP, draw=m.draw_sweep,
    ),
    "methods": Entry(
        blocks={
            "README.md": methods, "docs/sweep.md": shown("method", METHODS, METHODS_PICTURE),
        },
        command="rdm sweep digits_methods --seed 0 to 4",
        measure=measure_methods, seeds=m.SEEDS, columns=METHODS, draw=draw_methods,
    ),
    "filtered": Entry(
        blocks={"docs/sweep.md": shown("method, filter", METHODS)},
        command="rdm sweep digits_dino, and digits_swav",
        measure=measure_filtered, columns=METHODS,
    ),
    "response": Entry(
        blocks={"docs/telemetry.md": shown("recipe", m.RESPONSE)},
        command="rdm train digits_simsiam and digits_byol, --seed 0 to 4",
        measure=m.measure_response, seeds=m.SEEDS, columns=m.RESPONSE, draw=m.draw_response,
    ),
    "guard": Entry(
        blocks={"docs/telemetry.md": shown("run", m.GUARD)},
        command="rdm train digits_... --epochs 30, six runs",
        measure=m.measure_guard, columns=m.GUARD,
    ),
    "branches": Entry(
        blocks={"docs/evaluation.md": shown("`digits_byol`, branch", m.DIGITS)},
        command="rdm train digits_byol --seed 0 to 2, and rdm eval --branch ... --bn ...",
        measure=m.measure_branches, seeds=m.FEW, columns=m.DIGITS,
    ),
    "vit": Entry(
        blocks={"docs/reproducing.md": shown("ViT on digits", m.DIGITS, after=TEST_IMAGES)},
        command="rdm train digits_vit_... --seed 0 to 4, and rdm eval",
        measure=measure_vit, seeds=m.SEEDS, columns=m.DIGITS,
    ),
    "solvers": Entry(
        blocks={"docs/evaluation.md": shown("solver", m.TOP1)},
        command="python -m bench.numbers solvers --check",
        measure=m.measure_solvers, columns=m.TOP1, quick=True,
    ),
    "memory": Entry(
        blocks={"docs/evaluation.md": shown("protocol (and kNN)", m.MEMORY)},
        command="python -m bench.evaluation_memory --protocol NAME",
        measure=m.measure_memory, columns=m.MEMORY,
    ),
    "accuracy": Entry(
        blocks={"kernels/README.md": None}, command="make accuracy",
        measure=passes("-m", "bench.accuracy", "--engine", "gemm", "--device", "cpu"),
    ),
    "prototypes": Entry(
        blocks={"kernels/README.md": None},
        command="python -m bench.prototypes --write kernels/README.md",
        measure=passes("-m", "bench.prototypes", "--device", "cpu"),
    ),
    "launches": Entry(
        blocks={"kernels/README.md": None},
        command="python -m bench.launches --write kernels/README.md",
        measure=passes("-m", "bench.launches", "--check", "kernels/README.md"), quick=True,
    ),
    "cutoff": Entry(
        blocks={"docs/method.md": shown("float32 projections, 256 x 256", CUTOFF)},
        command="RDM_CIFAR10_NPZ=... python -m bench.numbers cutoff --check",
        measure=measure_cutoff, columns=CUTOFF, quick=True,
    ),
    "faults": Entry(
        blocks={"docs/reliability.md": None}, command="make faults", why="takes half an hour"
    ),
    "cifar": Entry(
        blocks={"README.md": None}, command="rdm train cifar10_rdm_simsiam ..., below the table",
        why="needs CIFAR-10 and half an hour",
    ),
    "peers": Entry(
        blocks={"docs/performance.md": None}, why=TIMING,
        command="python -m bench.compare_peers; pytest bench/bench_step.py",
    ),
    "loaders": Entry(
        blocks={"docs/performance.md": None}, why=TIMING,
        command="pytest bench/bench_loader.py bench/bench_data_wait.py",
    ),
    "results": Entry(
        blocks={"bench/README.md": None}, why="needs a GPU", command="python -m bench.campaign"
    ),
    "views": Entry(
        blocks={"docs/data.md": None}, why="bounds, held by these tests",
        command="pytest tests/data/views tests/data/loaders",
    ),
    "bounds": Entry(
        blocks={"kernels/README.md": None}, why="bounds, held by these tests",
        command="pytest tests/kernels",
    ),
    "published": Entry(
        blocks={"docs/reproducing.md": None}, why="published by others, not measured here",
        command="the READMEs of solo-learn and SimSiam",
    ),
}  # fmt: skip
