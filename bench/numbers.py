"""The numbers on the pages: list them, measure them again, write them.

    python -m bench.numbers [NAME ...]              list names, pages, commands
    python -m bench.numbers [NAME ...] --check      measure again; exit with 1 if a number is off
    python -m bench.numbers [NAME ...] --write      measure, then write results, tables and figures
    python -m bench.numbers --render                tables from the results, nothing is measured
      --quick        check only what takes a CPU a minute or two
      --jobs N       runs at a time, one thread each (default: one per core)
      --runs DIR     keep the runs there; the same command continues them

`bench/results/NAME.json` holds every value, with machine and versions. The text between the lines
`<!-- NAME: begin -->` and `<!-- NAME: end -->` of a page is made from it, or written by hand from
the output of the listed command. `bench/pages.py` has all names.

A number is the mean of n values, one per seed, with their standard deviation s. It agrees with m
new values if the means differ by at most

    max(K s sqrt(1/n + 1/m), floor),    K = 5

For n = 5, a correct number fails with probability 0.0075 (Student's t, 4 degrees of freedom). The
floor is the column's: one test image, or the tolerance of a number that was measured once (s = 0).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bench.machine import ROOT, describe
from bench.markdown import between, replace_between
from bench.measured import Column, Runs, Values
from bench.pages import ENTRIES, Entry, Record

K = 5.0
RESULTS = ROOT / "bench" / "results"


# ---- the rule ----------------------------------------------------------------------------------


def tolerance(committed: Sequence[float], n_new: int, column: Column) -> float:
    """Largest difference of means that agrees.

    Args:
        committed: values, one per seed.
        n_new: number of values measured again.
        column: holds the floor, absolute and relative to the committed mean.
    """
    n = len(committed)
    s = statistics.stdev(committed) if n > 1 else 0.0
    floor = max(column.absolute, column.relative * abs(statistics.mean(committed)))
    return max(K * s * (1 / n + 1 / n_new) ** 0.5, floor)


def compare(entry: Entry, committed: Values, found: Values) -> Iterable[tuple[str, bool]]:
    """A line for each number that was measured again, and whether it agrees."""
    for row, columns in found.items():
        for column, values in columns.items():
            where = f"{row}, {column}"
            old = committed.get(row, {}).get(column)
            if old is None:
                yield f"{where}: not among the results", False
                continue
            new, mean = statistics.mean(values), statistics.mean(old)
            allowed = tolerance(old, len(values), entry.columns[column])
            agrees = abs(new - mean) <= allowed  # False for NaN
            sign = "=" if agrees else "differs from"
            yield f"{where}: {new:.4g} {sign} {mean:.4g} within {allowed:.2g}", agrees


# ---- pages -------------------------------------------------------------------------------------


def read_record(name: str) -> Record:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def texts(entry: Entry, record: Record) -> dict[Path, str]:
    """The text that a record gives each page."""
    return {ROOT / page: text(record) for page, text in entry.blocks.items() if text}


def stale(name: str) -> list[str]:
    """Pages that do not show the results."""
    made = texts(ENTRIES[name], read_record(name))
    return [page.name for page, text in made.items() if between(page, name) != text.strip()]


def render(name: str) -> None:
    """Write the texts made from the results to their pages."""
    for page, text in texts(ENTRIES[name], read_record(name)).items():
        replace_between(page, name, text)


# ---- the command -------------------------------------------------------------------------------


def check(name: str, runs: Runs, quick: bool) -> bool:
    """Measure again and compare; True if all agrees."""
    entry = ENTRIES[name]
    print(f"{name}:", flush=True)
    lines: list[tuple[str, bool]] = []
    try:
        found = entry.measure(runs, quick) if entry.measure else {}
        if entry.columns:
            lines = [
                (f"{page} does not show bench/results/{name}.json", False) for page in stale(name)
            ]
            lines += compare(entry, read_record(name)["values"], found)
        else:
            lines = [("its bounds hold", True)]
    except RuntimeError as error:
        lines = [(str(error), False)]
    for line, agrees in lines:
        print(f"  {'ok ' if agrees else 'BAD'} {line}", flush=True)
    return all(agrees for _, agrees in lines)


def write(name: str, runs: Runs) -> None:
    """Measure, and write the results and everything that shows them."""
    entry = ENTRIES[name]
    print(f"{name}:", flush=True)
    values = entry.measure(runs, False) if entry.measure else {}
    record = {"machine": describe(), "seeds": list(entry.seeds), "values": values}
    (RESULTS / f"{name}.json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    render(name)
    if entry.draw:
        entry.draw(runs)


def describe_entry(name: str) -> str:
    """A name with its pages, its command, and whether it is checked."""
    entry = ENTRIES[name]
    quick = ", in part by --quick" if entry.quick else ""
    status = f"checked by --check{quick}" if entry.measure else f"not checked here: {entry.why}"
    return f"{name} ({', '.join(entry.blocks)})\n    {entry.command}\n    {status}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.numbers", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENTRIES)}")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="measure again and compare")
    action.add_argument("--write", action="store_true", help="measure and write")
    action.add_argument("--render", action="store_true", help="write tables from the results")
    parser.add_argument("--quick", action="store_true", help="check in a minute or two")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs")
    args = parser.parse_args(arguments)
    if unknown := set(args.names) - set(ENTRIES):
        parser.error(f"no numbers are named {', '.join(sorted(unknown))}")
    if args.quick and not args.check:
        parser.error("--quick needs --check: a part of the seeds is no result")
    torch.set_num_threads(1)
    names = args.names or list(ENTRIES)
    wrong = []
    with tempfile.TemporaryDirectory(prefix="rdm-numbers-") as scratch:
        runs = Runs(args.runs or Path(scratch), args.jobs)
        for name in names:
            entry = ENTRIES[name]
            if args.check and entry.measure and (entry.quick or not args.quick):
                wrong += [] if check(name, runs, args.quick) else [name]
            elif args.write and entry.columns:
                write(name, runs)
            elif args.render and entry.columns:
                render(name)
            else:
                print(describe_entry(name))
    if wrong:
        hint = "mend the code, or --write new numbers"
        print(f"error: {', '.join(wrong)} changed: {hint}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
