"""The two parts of `rdm doctor`, printed as they come and kept as JSON."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rdm_fast.config import Config
from rdm_fast.data import build_loader, load
from rdm_fast.errors import CannotCreate, OutputFailed, UsageError
from rdm_fast.filters.engines.choice import choose
from rdm_fast.runtime import atomic_files
from rdm_fast.tools.doctor.machine import Finding, has_fast_bf16, look_at_machine, usable_cpus
from rdm_fast.tools.doctor.stages import Stage, Step
from rdm_fast.tools.doctor.verdict import Situation, Verdict, verdict

WIDTH = 120  # of a table where there is no terminal


def diagnose(config: Config, device: torch.device, *, batches: int, path: Path | None) -> None:
    """Print what the machine has, then where the time of a run's step goes.

    Args:
        config: the run. Its data are read; its folder is neither read nor written.
        device: where the step runs.
        batches: measured of each stage, at most.
        path: file for all of it as JSON; None for none.

    Raises:
        UserError: the data cannot be used, or the file cannot be written.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise CannotCreate(f"--json {path}: there is no folder {path.absolute().parent}")
    console = make_console()
    findings = look_at_machine()
    console.print(machine_table(findings, console.is_terminal))
    for finding in findings:
        if finding.install:  # outside the table, to be copied whole
            _say(console, f"for {finding.name}:  {finding.install}")
    images = load(config.data, "train")
    loader = build_loader(config, images, rank=0, world_size=1, device=device)
    engine = "none"
    if config.predictor == "spectral":
        engine = choose(config.filter, device)
    _say(
        console,
        f"\nmeasuring {config.method}, predictor {config.predictor}, {config.model.backbone}, "
        f"batch {config.optim.global_batch} of {len(images)} images of {config.data.name}, "
        f"{config.precision}, on {device.type}, loader {loader.name}, filter engine {engine}",
    )
    step = Step(config, images, loader, device, batches=batches)
    try:
        stages = list(step.stages())
    except torch.OutOfMemoryError:
        raise UsageError(
            f"--optim.global-batch {config.optim.global_batch} does not fit into the memory of "
            f"{device}: give less, or --optim.accumulate {2 * config.optim.accumulate}"
        ) from None
    console.print(stage_table(stages, console.is_terminal))
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
        _write(path, as_json(findings, stages, found, device))


def make_console() -> Console:
    """Tables with lines and colors on a terminal; plain elsewhere, and where that is asked for."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "dumb") == "dumb"
    console = Console(highlight=False, force_terminal=False if plain else None)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def _say(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def _table(terminal: bool, *columns: str, title: str) -> Table:
    table = Table(box=box.ROUNDED if terminal else None, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def machine_table(findings: Iterable[Finding], terminal: bool) -> Table:
    table = _table(terminal, "", "here", title="machine")
    for finding in findings:
        table.add_row(finding.name, escape(finding.found))
    return table


def stage_table(stages: Iterable[Stage], terminal: bool) -> Table:
    table = _table(terminal, "stage", "images/s", "ms a batch", "batches", "", title="step")
    for column in table.columns[1:4]:
        column.justify = "right"
    for stage in stages:
        numbers = ["", "", ""]
        if stage.seconds is not None and stage.images_per_s is not None:
            speed, took = f"{stage.images_per_s:,.0f}", f"{1e3 * stage.seconds:,.1f}"
            numbers = [speed, took, str(stage.batches)]
        table.add_row(stage.name, *numbers, escape(stage.note))
    return table


def as_json(
    findings: list[Finding], stages: list[Stage], found: Verdict, device: torch.device
) -> dict[str, Any]:
    """The report as JSON values: machine, stages and verdict."""
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


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        atomic_files.replace(path, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise OutputFailed(f"--json {path} could not be written: {error.strerror}") from error
