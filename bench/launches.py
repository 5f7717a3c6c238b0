"""How many kernels does a loss launch on a GPU, and how long must that take?

    python -m bench.launches [--filters online target] [--shape 512 2048] [--dtype bfloat16]
                             [--engine auto gemm eigh] [--given] [--operations]
                             [--write FILE] [--check FILE] [--json FILE]

Needs no GPU: the loss and its gradient run on tensors without data, and everything that would be
launched is counted (`bench.counting`).

The predicted times follow from the counts by the constants there, as kernels/README.md explains.
They are no measurements. `--check` fails if the table in a file has other counts or times.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton

from bench.accuracy import LOGS, ONLINE
from bench.counting import Count, counting
from bench.fake_device import backward, fake_device
from bench.markdown import Columns, between, replace_between, table_of
from bench.prototypes import RECIPES, loss_of
from rdm_fast import FilterConfig
from rdm_fast.filters.loss import SpectralCosine

DTYPES = ["bfloat16", "float16", "float32"]


# ---- a filter ------------------------------------------------------------------------------------


def count(
    config: FilterConfig, shape: tuple[int, int], dtype: torch.dtype, *, given: bool = False
) -> Count:
    """Launches of the mean loss of two views [B, D] and its gradient; needs `fake_device`.

    Args:
        given: the targets are given, as in BYOL; else they are the other view, as in SimSiam.
    """
    criterion = SpectralCosine(config)
    online = torch.empty(2, *shape, device="cuda", dtype=dtype, requires_grad=True)
    target = torch.empty(2, *shape, device="cuda", dtype=dtype) if given else None
    with counting():
        criterion(online, target)  # copies constants to the device
    with counting() as launches:
        (grad,) = backward(criterion(online, target).mean()).values()
    assert grad.shape == online.shape and grad.dtype == dtype
    return launches.count


def count_prototypes(name: str, B: int, dtype: torch.dtype) -> Count:
    """Launches from two views of B rows of unit length to the loss, and back to their gradient and
    the prototypes'; needs `fake_device`."""
    with torch.device("cuda"):
        method = loss_of(name, None if dtype == torch.float32 else dtype)
        D = method.prototypes.weight.shape[1]
        z = torch.empty(2, B, D, requires_grad=True)
    with counting() as launches:
        grads = backward(method.loss(method.prototypes(z), z.detach()))
    assert len(grads) == 2  # of z and of the prototypes
    return launches.count


# ---- the report --------------------------------------------------------------------------------


def filters() -> dict[str, FilterConfig]:
    """Every filter by its name, a row each."""
    found = {}
    for location in ("online", "target"):
        for sigma in ONLINE:
            found[f"{location} s^{sigma:g}"] = FilterConfig(location=location, sigma=sigma)
        for kind in LOGS:
            found[f"{location} {kind}"] = FilterConfig(location=location, kind=kind)
    return found


COLUMNS: Columns = {
    "filter": lambda row: row["filter"],
    "launches": lambda row: str(row["launches"]),
    "Triton": lambda row: str(row["triton"]),
    "cuBLAS": lambda row: str(row["products"]),
    "PyTorch": lambda row: str(row["others"]),
    "factorizations": lambda row: named(row["factorizations"]) or "-",
    "waits": lambda row: str(row["waits"]),
    "graph, ms": lambda row: f"{1e3 * row['device']:.2f}" if not row["waits"] else "-",
    "eager, ms": lambda row: f"{1e3 * row['eager']:.2f}",
    "measured": lambda row: row["measured"],
}


def named(calls: dict[str, int]) -> str:
    return ", ".join(f"{times} {name}" for name, times in sorted(calls.items()))


def measured(table: str) -> dict[str, str]:
    """What was measured, which is the last column of a table, by filter."""
    cells = [line.split("|") for line in table.splitlines() if line.startswith("| ")]
    return {row[1].strip(): row[-2].strip() for row in cells}


def counted(table: str) -> list[str]:
    """The rows of a table without what was measured."""
    return [line.rsplit("|", 2)[0] for line in table.splitlines() if line.startswith("| ")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.launches", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--filters", nargs="+", default=[""], help="only those with one of these in their name"
    )
    parser.add_argument("--shape", nargs=2, type=int, default=[512, 2048], metavar=("B", "D"))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--engine", choices=["auto", "gemm", "eigh"], default="auto")
    parser.add_argument("--given", action="store_true", help="targets are given, as in BYOL")
    parser.add_argument("--operations", action="store_true", help="list what is launched, by name")
    parser.add_argument("--write", type=Path, help="Markdown file with a table to replace")
    parser.add_argument("--check", type=Path, help="Markdown file with the same table")
    parser.add_argument("--json", type=Path, help="JSON file for all numbers")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="filter.")

    file = args.write or args.check
    known = measured(between(file, "launches")) if file else {}
    rows = []

    def add_row(name: str, found: Count) -> None:
        totals = {"launches": found.launches, "eager": found.eager}
        rows.append({"filter": name, "measured": known.get(name, "")} | totals | asdict(found))

    def wanted(names: Iterable[str]) -> Iterable[str]:
        return (name for name in names if any(part in name for part in args.filters))

    dtype = getattr(torch, args.dtype)
    with fake_device():
        configs = filters()
        for name in wanted(configs):
            config = replace(configs[name], engine=args.engine)
            add_row(name, count(config, tuple(args.shape), dtype, given=args.given))
        of_filters = len(rows)
        for name in wanted(RECIPES):
            add_row(name, count_prototypes(name, args.shape[0], dtype))
    B, D = args.shape
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    targets = "given targets" if args.given else "each other's targets"
    text = (
        f"Two views ({B}, {D}), {args.dtype}, {targets}, engine={args.engine}, {versions}.\n"
        f"Counted; times predicted.\n\n{table_of(rows[:of_filters], COLUMNS)}"
    )
    columns: Columns = {"loss": COLUMNS["filter"]} | COLUMNS
    del columns["filter"]
    if of_prototypes := rows[of_filters:]:
        text += (
            f"\n\nDINO and SwAV from two views of {B} rows of unit length to the loss, and back; D "
            f"is 256 and 128.\n\n{table_of(of_prototypes, columns)}"
        )
    print(text)
    if args.operations:
        for row in rows:
            print(f"\n{row['filter']}: {named(row['operations'])}")
    if args.write:
        replace_between(args.write, "launches", text)
    if args.json:
        args.json.write_text(json.dumps({"args": vars(args), "rows": rows}, default=str))
    if args.check and counted(between(args.check, "launches")) != counted(text):
        print(f"error: {args.check} has another table: use --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
