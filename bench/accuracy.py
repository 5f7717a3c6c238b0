"""How accurate is the filtered loss? Its gradient against float64, for every filter and spectrum.

    python -m bench.accuracy [--engine gemm eigh auto] [--dtype float32 bfloat16]
                             [--shape 128 384] [--device cpu] [--write FILE] [--json FILE]

Prints a table in Markdown for each engine and dtype. A cell is 1 - cos(dP, exact dP), the larger of
two views; exact is the float64 gradient of the engine's own definition on the same inputs: the
paper's, without directions under the cutoff, or damped (gemm). What else a cell may say:

    0          the exact gradient is 0, and what came out is within the rounding of 0, as below
    |dP| x     it is 0, and what came out is not: x in units of 1 / (2 B |p_i|)
    flagged    the engine reported that it is not accurate here: no gradient in this step; in the
               next, `auto` takes eigh (its result stands behind the word), `gemm` ends the run

Exits with 1 if something is less accurate than `least` allows, or NaN comes of what is finite.

Rounding of 0. A batch of rank 1 has no gradient: with y_i = p_i W and u_i = t_i / |t_i|,

    dL/dy_i = (cos_i y_i / |y_i| - u_i) / (2 B |y_i|)

is a difference of equal vectors, each with the rounding of sums of up to m = max(B, D) terms,
(m + 2) u relative, and W makes it at most |W| times as long. So row i of dP is 0 up to

    (m + 2) u |W| / (2 B |y_i|)  online        (m + 2) u |W| |z_i| / (|z_i W| 2 B |p_i|)  target
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import describe
from bench.markdown import replace_between, table
from rdm_fast import FilterConfig
from rdm_fast.engines import engine_for
from rdm_fast.errors import Unavailable
from tests.spectra import damped_filter, gradients, paper_filter, paper_loss, two_views
from tests.spectra import with_spectrum as matrix

ONLINE = [2.0, 1.0, 0.5, "log", "log_1", "log_2", -0.3, -0.5, -0.7, -1.0]
TARGET = [-1.0, -0.7, -0.5, -0.3]
SPECTRA = [
    "flat",
    "k^-1/2",
    "k^-1",
    "k^-2",
    "clusters",
    "centred",
    "duplicates",
    "1e-4 x",
    "1e4 x",
    "rank 8 + noise",
    "rank 1",
    "zero",
]
FilterOf = Callable[[Tensor, FilterConfig], Tensor]
COLLAPSED = {"rank 8 + noise", "rank 1", "zero"}
FLOAT32_ROUNDOFF = 2.0**-24


@dataclass(frozen=True)
class Cell:
    """One filter of one batch."""

    error: float  # 1 - cosine of the gradients; of a gradient that should be 0, its size, or 0
    loss_error: float
    is_zero: bool  # the exact gradient is
    finite: bool
    flagged: bool

    @property
    def text(self) -> str:
        if not self.finite:
            return "NaN"
        if self.is_zero:
            found = f"|dP| {self.error:.0e}" if self.error else "0"
        else:
            found = f"{self.error:.0e}"
        return f"flagged {found}" if self.flagged else found


# ---- the grid --------------------------------------------------------------------------------


def filters() -> dict[str, FilterConfig]:
    """The rows: every filter by its name."""
    return {
        f"{location} {g if isinstance(g, str) else f's^{g:g}'}": config(location, g)
        for location, responses in (("online", ONLINE), ("target", TARGET))
        for g in responses
    }


def config(location: str, g: str | float) -> FilterConfig:
    if isinstance(g, str):
        return FilterConfig(location=location, kind=g)
    return FilterConfig(location=location, sigma=g)


@cache
def batch(spectrum: str, B: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two correlated views [B, D] whose singular values are as the column's name says.

    duplicates: the second half of the rows equals the first. rank 1: of both views together.
    rank 8 + noise: 1/k for k <= 8, then 1e-4, a tenth of the cutoff.
    """
    match spectrum:
        case "rank 1":
            first = two_views(B, D, spectrum, torch.float64)[0]
            views = first, matrix(B, B, torch.ones(B), seed=1) @ first
        case "rank 8 + noise":
            k = torch.arange(1.0, min(B, D) + 1)
            s = math.sqrt(min(B, D)) * torch.where(k <= 8, 1 / k, 1e-4)
            first = matrix(B, D, s)
            views = first, 0.8 * first + 0.6 * matrix(B, D, s, seed=1)
        case "zero":
            views = (torch.zeros(B, D, dtype=torch.float64),) * 2
        case "centred":
            views = tuple(z - z.mean(dim=0) for z in two_views(B, D, "k^-1/2", torch.float64))
        case "duplicates":
            half = two_views((B + 1) // 2, D, "k^-1/2", torch.float64)
            views = tuple(torch.cat([z, z])[:B] for z in half)
        case "1e-4 x" | "1e4 x":
            scale = float(spectrum.split()[0])
            views = tuple(scale * z for z in two_views(B, D, "k^-1/2", torch.float64))
        case _:
            views = two_views(B, D, spectrum, torch.float64)
    return views[0].to(dtype), views[1].to(dtype)


def least(name: str, spectrum: str) -> float:
    """The cosine with the exact gradient that a filter must reach."""
    config = filters()[name]
    if not config.is_falling:
        return 0.9999
    if config.location == "target":
        return 0.999
    return -1.0 if spectrum in COLLAPSED else 0.99


def fault(name: str, spectrum: str, cell: Cell) -> str:
    """What is wrong with a cell, or nothing."""
    if not cell.finite:
        return "not finite, of finite inputs"
    allowed = 0.0 if cell.is_zero else 1 - least(name, spectrum)
    if cell.error > allowed and (not cell.is_zero or spectrum not in COLLAPSED):
        return f"{cell.text}, over {allowed:.0e}"
    return ""


# ---- one cell ----------------------------------------------------------------------------------


def measure(config: FilterConfig, z1: Tensor, z2: Tensor, device: torch.device) -> Cell:
    """The filter's loss and gradient on this device, compared with float64 on the CPU."""
    engine_for.cache_clear()
    loss, *grads = gradients(z1.to(device), z2.to(device), config)
    engine = engine_for(config, device)
    flagged = False
    try:
        used = engine.current()
    except Unavailable:
        flagged, used = True, "gemm"
    if engine.failures:
        flagged = True
        loss, *grads = gradients(z1.to(device), z2.to(device), config)
    found = [grad.cpu().double() for grad in grads]

    filter_of = partial(normalised, damped_filter if used == "gemm" else paper_filter)
    if z1.any():
        exact_loss, *exact = paper_loss(z1, z2, config, filter_of=filter_of)
        roundings = [
            rounding_of_zero(
                config, p, t, filter_of(p if config.location == "online" else t, config)
            )
            for p, t in ((z1, z2), (z2, z1))
        ]
    else:  # neither definition divides by 0
        exact_loss, *exact = torch.zeros(()), *(torch.zeros_like(z1).double() for _ in range(2))
        roundings = [torch.zeros(len(z1), dtype=torch.float64)] * 2

    is_zero = all(
        bool((grad.norm(dim=1) <= rounding).all())
        for grad, rounding in zip(exact, roundings, strict=True)
    )
    finite = bool(loss.isfinite()) and all(bool(grad.isfinite().all()) for grad in found)
    if is_zero:
        errors = [
            float(((grad - other).norm(dim=1) * 2 * len(p) * p.double().norm(dim=1)).max())
            if ((grad - other).norm(dim=1) > rounding).any()
            else 0.0
            for grad, other, rounding, p in zip(found, exact, roundings, (z1, z2), strict=True)
        ]
    else:
        errors = [
            max(1 - float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)), 1e-16)
            for a, b in zip(found, exact, strict=True)
        ]
    return Cell(max(errors), abs(float(loss) - float(exact_loss)), is_zero, finite, flagged)


def normalised(filter_of: FilterOf, X: Tensor, config: FilterConfig) -> Tensor:
    """W, but |W| = 1 for a power of s: its factor is not to matter, not even for tiny rows."""
    W = filter_of(X, config)
    return W / torch.linalg.matrix_norm(W, 2) if config.kind == "poly" else W


def rounding_of_zero(config: FilterConfig, p: Tensor, t: Tensor, W: Tensor) -> Tensor:
    """How long a row of a gradient may be, [B], that is 0 but for rounding (see above)."""
    p, t = p.double(), t.double()
    relative = (max(p.shape) + 2) * FLOAT32_ROUNDOFF * torch.linalg.matrix_norm(W, 2)
    if config.location == "online":
        return relative / (2 * len(p) * (p @ W).norm(dim=1))
    stretch = t.norm(dim=1) / (t @ W).norm(dim=1)
    return relative * stretch / (2 * len(p) * p.norm(dim=1))


def is_flagged_by_nonfinite(
    config: FilterConfig,
    bad: float,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether one value that is not finite makes the loss NaN, and no gradient NaN."""
    engine_for.cache_clear()
    z1, z2 = (z.to(device).clone() for z in batch("k^-1/2", *shape, dtype))
    z1[1, 2] = bad
    loss, *grads = gradients(z1, z2, config)
    return bool(loss.isnan()) and all(bool(grad.isfinite().all()) for grad in grads)


# ---- the report --------------------------------------------------------------------------------


def report(
    engine: str, dtype: torch.dtype, shape: tuple[int, int], device: torch.device
) -> tuple[str, list[str], dict[str, dict[str, Cell]]]:
    """The table with its caption, what is wrong in it, and its cells by filter and spectrum."""
    rows = {name: replace(config, engine=engine) for name, config in filters().items()}
    cells: dict[str, dict[str, Cell]] = {name: {} for name in rows}
    for spectrum in SPECTRA:
        z1, z2 = batch(spectrum, *shape, dtype)
        for name, config in rows.items():
            cells[name][spectrum] = measure(config, z1, z2, device)

    faults = [
        f"engine={engine} {dtype} {name} of {spectrum}: {text}"
        for name, row in cells.items()
        for spectrum, cell in row.items()
        if (text := fault(name, spectrum, cell))
    ]
    unflagged = [
        f"{name} ({bad})"
        for name, config in rows.items()
        for bad in (math.nan, math.inf)
        if not is_flagged_by_nonfinite(config, bad, shape, dtype, device)
    ]
    faults += [
        f"engine={engine} {dtype} {name}: no NaN loss with finite gradient" for name in unflagged
    ]

    B, D = shape
    lines = [
        f"**engine={engine}, {str(dtype).removeprefix('torch.')}, [{B}, {D}]**",
        table(
            ["filter", *SPECTRA, "loss, worst"],
            [
                [name, *(cell.text for cell in row.values()), worst_loss(row)]
                for name, row in cells.items()
            ],
        ),
        "One NaN or one infinity in a batch: "
        + (
            f"NOT flagged by {', '.join(unflagged)}."
            if unflagged
            else "the loss is NaN, so the step is skipped, and the gradient finite, for all of these."
        ),
    ]
    return "\n\n".join(lines), faults, cells


def worst_loss(row: dict[str, Cell]) -> str:
    """The largest error of the loss of a filter, over all spectra."""
    return f"{max(cell.loss_error for cell in row.values()):.0e}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--engine", nargs="+", choices=["auto", "gemm", "eigh"], default=["auto"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shape", nargs=2, type=int, default=[128, 384], metavar=("B", "D"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="file whose accuracy table this replaces")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="filter.")
    torch.set_num_threads(1)

    machine = describe()
    texts = [
        f"torch {machine['torch']}, triton {machine['triton']}, {args.device} "
        f"({machine['device']}), {machine['date']}."
    ]
    faults: list[str] = []
    numbers = []
    for engine in args.engine:
        for name in args.dtype:
            text, wrong, cells = report(
                engine, getattr(torch, name), tuple(args.shape), torch.device(args.device)
            )
            texts.append(text)
            faults += wrong
            rows = {row: {s: asdict(c) for s, c in cs.items()} for row, cs in cells.items()}
            numbers.append({"engine": engine, "dtype": name, "shape": args.shape, "cells": rows})
    markdown = "\n\n".join(texts)
    print(markdown)
    if args.write:
        replace_between(args.write, "accuracy", markdown)
    if args.json:
        result = {"machine": machine, "markdown": markdown, "faults": faults, "tables": numbers}
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if faults:
        print("\nNot accurate enough:", *faults, sep="\n  ", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
