"""`rdm doctor`: prints what the machine has and where the time of a step goes; also as JSON."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rdm_fast.config import Config
from rdm_fast.data import build_loader, load
from rdm_fast.errors import CannotCreate, OutputFailed, UsageError, printable
from rdm_fast.filters.engines.choice import choose
from rdm_fast.runtime import atomic_files
from rdm_fast.tools.doctor.machine import Finding, has_fast_bf16, inspect_machine, usable_cpus
from rdm_fast.tools.doctor.stages import Stage, StepParts
from rdm_fast.tools.doctor.verdict import Situation, Verdict, verdict

WIDTH = 120  # of a table without a terminal


def diagnose(config: Config, device: torch.device, *, batches: int, path: Path | None) -> None:
    """Print what the machine has, then where the time of a run's step goes.

    Args:
        config: the run. Its data are read; its folder is not touched.
        device: where the step runs.
        batches: largest number of batches to measure in each stage.
        path: JSON file to write, if any.

    Raises:
        UserError: the data cannot be used, or the file cannot be written.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise CannotCreate(f"--json {path}: there is no folder {path.absolute().parent}")
    console = make_console()
    findings = inspect_machine()
    _table(console, "machine", "|here", [(finding.name, finding.found) for finding in findings])
    for finding in findings:
        if finding.install:  # outside the table, for copying
            _say(console, f"for {finding.name}:  {finding.install}")
    images = load(config.data, "train")
    loader = build_loader(config, images, rank=0, world_size=1, device=device)
    engine = "none"
    if config.predictor == "spectral":
        engine = choose(config.filter, device)
    _say(console, "")
    _say(
        console,
        f"measuring {config.method}, predictor {config.predictor}, {config.model.backbone}, "
        f"batch {config.optim.global_batch} of {len(images)} images of {config.data.name}, "
        f"{config.precision}, on {device.type}, loader {loader.name}, filter engine {engine}",
    )
    try:
        stages = list(StepParts(config, images, loader, device, batches=batches).stages())
    except torch.OutOfMemoryError:
        raise UsageError(
            f"--optim.global-batch {config.optim.global_batch} does not fit in the memory of "
            f"{device}: lower it, or give --optim.accumulate {2 * config.optim.accumulate}"
        ) from None
    _table(console, "step", "stage|images/s>|ms per batch>|batches>|", map(_row, stages))
    missing = {finding.name: finding.install for finding in findings}
    found = verdict(
        Situation(
            config=config,
            seconds={s.name: s.seconds for s in stages if s.seconds is not None},
            loader=loader.name,
            engine=engine,
            on_gpu=device.type == "cuda",
            cpus=usable_cpus(),
            threads=torch.get_num_threads(),
            fast_bf16=device.type == "cuda" or has_fast_bf16(),
            dali=missing["DALI"],
        )
    )
    _say(console, f"bottleneck: {found.bottleneck} ({found.why})")
    for line in found.advice:
        _say(console, f"try {line}")
    if path is not None:
        report = as_json(findings, stages, found, device)
        try:
            atomic_files.replace(path, json.dumps(report, indent=1) + "\n")
        except OSError as error:
            raise OutputFailed(f"--json {path} cannot be written: {error.strerror}") from error


def make_console() -> Console:
    """Lines and colors on a terminal; plain text elsewhere, and with NO_COLOR or TERM=dumb."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "dumb") == "dumb"
    console = Console(highlight=False, force_terminal=False if plain else None)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def _say(console: Console, text: str) -> None:
    console.print(escape(printable(text)), soft_wrap=True)


def _table(console: Console, title: str, columns: str, rows: Iterable[Sequence[str]]) -> None:
    """Print a table; columns whose name ends in `>` are aligned to the right."""
    table = Table(
        box=box.ROUNDED if console.is_terminal else None, title=title, title_justify="left"
    )
    for column in columns.split("|"):
        side: Literal["left", "right"] = "right" if column.endswith(">") else "left"
        table.add_column(column.rstrip(">"), overflow="fold", justify=side)
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    console.print(table)


def _row(stage: Stage) -> tuple[str, ...]:
    numbers = ["", "", ""]
    if stage.seconds is not None and stage.images_per_s is not None:
        numbers = [
            f"{stage.images_per_s:,.0f}", f"{1e3 * stage.seconds:,.1f}", str(stage.batches)
        ]  # fmt: skip
    return (stage.name, *numbers, stage.note)


def as_json(
    findings: list[Finding], stages: list[Stage], found: Verdict, device: torch.device
) -> dict[str, Any]:
    """Machine, stages and verdict as JSON values."""
    return {
        "device": str(device),
        "machine": {f.name: {"found": f.found, "install": f.install or None} for f in findings},
        "stages": {
            s.name: {k: v for k, v in dataclasses.asdict(s).items() if k != "name"} for s in stages
        },
        "bottleneck": found.bottleneck,
        "why": found.why,
        "advice": found.advice,
    }
