"""How accurate is the filtered loss? Its gradient against float64, for every filter and spectrum.

    python -m bench.accuracy [--engine gemm eigh auto] [--dtype float32 bfloat16]
                             [--shape 128 384] [--device cpu] [--arithmetic tf32x3]
                             [--write FILE] [--rows FILE]

Prints a Markdown table for each engine and dtype. A cell is 1 - cos(dP, exact dP), the larger of
two views. Exact is the float64 gradient of the engine's own definition on the same inputs and
device: the paper's, without directions below the cutoff, or the damped one (gemm). Other cells:

    0          rank 1 and zero have no gradient, and the result is 0 within rounding (below)
    size x     the result is not 0, because the definition itself amplifies the rounding of its
               inputs; x is the length of the longest row in units of 1 / (2 B |p_i|)
    flagged    the engine reported that it is inaccurate here: no gradient in this step; in the
               next, `auto` takes eigh (its result follows the word), `gemm` ends the run

With --arithmetic tf32x3, a CPU forms the gemm engine's float32 products as tensor cores do: three
products of operands that are truncated to 10 bits. A filter that an engine refuses has no row.

Exits with 1 if a cell exceeds the limit in `fault`, or finite inputs give NaN.

Rounding of 0. Sums of up to m = max(B, D) terms are rounded by (m + 2) u. A filter amplifies that
by at most A = max(1, |g(cutoff s_1) / g(s_1)|) relative to the rest of a row: once in filtered rows
and, online, again in the gradient through W. "0" means x <= (m + 2) u A^2 (target: A).
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import describe
from bench.markdown import replace_between, table
from bench.rows import SMALL, append
from bench.tensor_cores import tf32x3
from rdm_fast import FilterConfig
from rdm_fast.config import Kind
from rdm_fast.errors import Unavailable
from rdm_fast.filters.engines.gemm import LEAST_CUTOFF
from rdm_fast.filters.loss import SpectralCosine
from tests.spectra import damped_filter, g, gradients, paper_filter, paper_loss, two_views
from tests.spectra import with_spectrum as matrix

ONLINE = [2.0, 1.0, 0.5, -0.3, -0.5, -0.7, -1.0]
LOGS: list[Kind] = ["log", "log_1", "log_2"]
TARGET = [-1.0, -0.7, -0.5, -0.3]
SPECTRA = [
    "flat",
    "k^-1/2",
    "k^-1",
    "k^-2",
    "clusters",
    "rank 8",
    "straddling",
    "centered",
    "duplicates",
    "1e-4 x",
    "1e4 x",
    "rank 8 + noise",
    "rank 1",
    "zero",
]
FilterOf = Callable[[Tensor, FilterConfig], Tensor]
SMALLEST = (24, 40)
NO_GRADIENT = {"rank 1", "zero"}
COLLAPSED = {"rank 8", "rank 8 + noise"} | NO_GRADIENT


@dataclass(frozen=True)
class Cell:
    """One filter of one batch."""

    error: float  # 1 - cosine; without a gradient, the size of the result, or 0
    limit: float | None  # without a gradient: twice the size that the definition itself gives
    loss_error: float
    finite: bool
    flagged: bool

    @property
    def text(self) -> str:
        if not self.finite:
            return "NaN"
        found = f"{self.error:.0e}" if self.error else "0"
        found = f"size {found}" if self.error and self.limit is not None else found
        return f"flagged {found}" if self.flagged else found


# ---- the grid --------------------------------------------------------------------------------


def filters() -> dict[str, FilterConfig]:
    """Every filter by its name, a row each."""
    logs = {f"online {kind}": FilterConfig(kind=kind) for kind in LOGS}
    powers = {f"online s^{sigma:g}": FilterConfig(sigma=sigma) for sigma in ONLINE}
    targets = {
        f"target s^{sigma:g}": FilterConfig(location="target", sigma=sigma) for sigma in TARGET
    }
    return powers | logs | targets


@cache
def batch(spectrum: str, B: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two correlated views [B, D] with the singular values that the column names.

    duplicates: the second half of the rows equals the first. rank 1: of both views together.
    rank 8 + noise: 1/k for k <= 8, then 1e-5, a tenth of the cutoff.
    """
    match spectrum:
        case "rank 1":
            first = two_views(B, D, spectrum, torch.float64)[0]
            views = first, matrix(B, B, torch.ones(B), seed=1) @ first
        case "rank 8 + noise":
            k = torch.arange(1.0, min(B, D) + 1)
            s = math.sqrt(min(B, D)) * torch.where(k <= 8, 1 / k, 1e-5)
            first = matrix(B, D, s)
            views = first, 0.8 * first + 0.6 * matrix(B, D, s, seed=1)
        case "zero":
            views = (torch.zeros(B, D, dtype=torch.float64),) * 2
        case "centered":
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


def fault(config: FilterConfig, spectrum: str, cell: Cell) -> str:
    """Description of a cell's fault, or an empty string."""
    if not cell.finite:
        return "not finite for finite inputs"
    if cell.limit is not None:
        limit = cell.limit
    elif config.why_not_gemm:  # an online g that falls steeply amplifies what eigh rounds
        limit = math.inf if spectrum in COLLAPSED else 1e-2
    else:
        limit = 1e-3 if config.is_falling else 1e-4
    return f"{cell.error:.1e}, over {limit:.1e}" if cell.error > limit else ""


# ---- one cell ----------------------------------------------------------------------------------


def measure(config: FilterConfig, spectrum: str, z1: Tensor, z2: Tensor, device: str) -> Cell:
    """The filter's loss and gradient on this device, compared with float64 there."""
    z1, z2 = z1.to(device), z2.to(device)
    criterion = SpectralCosine(config)
    loss, *grads = gradients(z1, z2, config, criterion=criterion)
    selector = criterion.selector
    try:
        used, flagged = selector.current(torch.device(device)), selector.failures > 0
    except Unavailable:
        used, flagged = "gemm", True
    if used == "eigh" and flagged:
        loss, *grads = gradients(z1, z2, config, criterion=criterion)
    found = [grad.double() for grad in grads]
    finite = bool(loss.isfinite()) and all(bool(grad.isfinite().all()) for grad in found)

    filter_of = partial(normalized, damped_filter if used == "gemm" else paper_filter)
    if spectrum == "zero":  # the definitions divide by 0
        exact_loss, *exact = torch.zeros(()), *(torch.zeros_like(grad) for grad in found)
    else:
        exact_loss, *exact = paper_loss(z1, z2, config, filter_of=filter_of)
    loss_error = abs(float(loss) - float(exact_loss))
    if spectrum not in NO_GRADIENT:
        cosines = [
            float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
            for a, b in zip(found, exact, strict=True)
        ]
        return Cell(max(1 - min(cosines), 1e-16), None, loss_error, finite, flagged)

    lengths = [p.double().norm(dim=1) if spectrum == "rank 1" else 1 for p in (z1, z2)]
    size, exact_size = (
        max(
            float((grad.norm(dim=1) * 2 * len(grad) * p).max())
            for grad, p in zip(grads, lengths, strict=True)
        )
        for grads in (found, exact)
    )
    cutoff = max(config.cutoff, LEAST_CUTOFF) if used == "gemm" else config.cutoff
    allowed = rounding_of_zero(config, cutoff, z1) if spectrum == "rank 1" else 0.0
    error = size if size > allowed else 0.0
    return Cell(error, 2 * exact_size + allowed, loss_error, finite, flagged)


def normalized(filter_of: FilterOf, X: Tensor, config: FilterConfig) -> Tensor:
    """W, scaled to |W|_F = 1 for a power of s, so that a cosine's eps does not matter."""
    W = filter_of(X, config)
    return W / torch.linalg.matrix_norm(W) if config.kind == "poly" else W


def rounding_of_zero(config: FilterConfig, cutoff: float, X: Tensor) -> float:
    """Largest x that rounding explains for a batch of rank 1 (see the module)."""
    s_1 = X.double().norm()
    amplified = max(1.0, abs(float(g(config, cutoff * s_1) / g(config, s_1))))
    passes = 2 if config.location == "online" else 1
    return (max(X.shape) + 2) * 2.0**-24 * amplified**passes


def flags_bad_value(
    config: FilterConfig, bad: float, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> bool:
    """Whether a value that is not finite makes the loss NaN and leaves the gradient finite."""
    z1, z2 = (z.to(device).clone() for z in batch("k^-1/2", *shape, dtype))
    z1[1, 2] = bad
    loss, *grads = gradients(z1, z2, config)
    return bool(loss.isnan()) and all(bool(grad.isfinite().all()) for grad in grads)


# ---- the report --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """One engine on batches of one dtype and shape."""

    engine: str
    dtype: str
    shape: tuple[int, int]
    cells: dict[str, dict[str, Cell]]  # by filter and spectrum
    unflagged: list[str]  # filters that do not flag a value that is not finite

    @property
    def faults(self) -> list[str]:
        where = f"engine={self.engine} {self.dtype}"
        inaccurate = [
            f"{where} {name} of {spectrum}: {text}"
            for name, row in self.cells.items()
            for spectrum, cell in row.items()
            if (text := fault(filters()[name], spectrum, cell))
        ]
        return inaccurate + [f"{where} {name}: no NaN loss" for name in self.unflagged]

    @property
    def markdown(self) -> str:
        B, D = self.shape
        header = ["filter", *SPECTRA, "loss, worst"]
        rows = [
            [
                name,
                *(cell.text for cell in row.values()),
                f"{max(cell.loss_error for cell in row.values()):.0e}",
            ]
            for name, row in self.cells.items()
        ]
        flagged = (
            "the loss is NaN, so the step is skipped, and the gradient is finite, for every filter."
        )
        if self.unflagged:
            flagged = f"NOT flagged by {', '.join(self.unflagged)}."
        return (
            f"engine={self.engine}, {self.dtype} ({B}, {D}):\n\n{table(header, rows)}\n\n"
            f"With one NaN or infinity in a batch, {flagged}"
        )


def report(
    engine: str, dtype: str, shape: tuple[int, int], device: str, rows: Path | None = None
) -> Report:
    """Measurements of all filters and spectra; each cell is also a row of a file."""
    where = {"engine": engine, "dtype": dtype, "shape": shape}
    configs = {
        name: replace(config, engine=engine)
        for name, config in filters().items()
        if engine != "gemm" or config.why_not_gemm is None
    }
    cells: dict[str, dict[str, Cell]] = {name: {} for name in configs}
    narrow = getattr(torch, dtype)
    for spectrum in SPECTRA[:2] if SMALL else SPECTRA:
        z1, z2 = batch(spectrum, *shape, narrow)
        for name, config in configs.items():
            cell = cells[name][spectrum] = measure(config, spectrum, z1, z2, device)
            found = asdict(cell) | {"text": cell.text, "fault": fault(config, spectrum, cell)}
            append(rows, where | {"filter": name, "spectrum": spectrum} | found)
    unflagged = [
        f"{name} ({bad})"
        for name, config in configs.items()
        for bad in (math.nan, math.inf)
        if not flags_bad_value(config, bad, shape, narrow, device)
    ]
    return Report(engine, dtype, shape, cells, unflagged)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--engine", nargs="+", choices=["auto", "gemm", "eigh"], default=["auto"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shape", nargs=2, type=int, default=[128, 384], metavar=("B", "D"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arithmetic", choices=["native", "tf32x3"], default="native")
    parser.add_argument(
        "--write", type=Path, help="Markdown file with an accuracy table to replace"
    )
    parser.add_argument("--rows", type=Path, help="file to append each cell to, as JSON")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="filter.")
    if args.device == "cpu":
        torch.set_num_threads(1)
    B, D = SMALLEST if SMALL else args.shape

    with tf32x3() if args.arithmetic == "tf32x3" else nullcontext():
        reports = [
            report(engine, dtype, (B, D), args.device, args.rows)
            for engine in args.engine
            for dtype in args.dtype
        ]
    machine = describe()
    versions = f"torch {machine['torch']}, triton {machine['triton']}"
    arithmetic = f"{args.arithmetic} arithmetic"
    where = f"{versions}, {args.device} ({machine['device']}), {arithmetic}, {machine['date']}."
    markdown = "\n\n".join([where, *(r.markdown for r in reports)])
    faults = [text for r in reports for text in r.faults]
    print(markdown)
    if args.write:
        replace_between(args.write, "accuracy", markdown)
    return report_faults(faults)


def report_faults(faults: list[str]) -> int:
    """Print them; returns the exit code."""
    if faults:
        print("\nNot accurate enough:", *faults, sep="\n  ", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
