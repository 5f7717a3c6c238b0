"""Whole runs for tests: stopped, resumed, disturbed, and what is compared between them."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rdm_fast.config import Config
from rdm_fast.data import Batch
from rdm_fast.errors import Interrupted
from rdm_fast.methods import build_method
from rdm_fast.run import checkpoint
from rdm_fast.run.folder import RunFolder
from rdm_fast.runtime.distributed import rank
from rdm_fast.training.train_step import TrainStep
from rdm_fast.training.trainer import Trainer

CPU = torch.device("cpu")
TIMING = ("images_per_s", "data_wait_s")
SAFETY = 4.0
"""Of a tolerance that is the largest of a few measured deviations."""
LAYERS = 10  # of the tiny backbone and projector, with their batch norms


def new_step(config: Config, device: torch.device = CPU) -> TrainStep:
    """The steps of a new method, at four steps an epoch."""
    torch.manual_seed(0)
    return TrainStep(build_method(config), config, device, steps_per_epoch=4)


def with_log(config: Config, **log: Any) -> Config:
    return replace(config, log=replace(config.log, **log))


def run(path: Path, config: Config, prepare: Callable[[Trainer], object] = lambda _: None) -> None:
    """Train from where the folder stands, as one process (or one rank) would."""
    with RunFolder.open(str(path), config, overwrite=False, rank=rank()) as folder:
        trainer = Trainer(config, folder, CPU)
        prepare(trainer)
        trainer.fit()


def rdm(line: str, *words: object) -> int | str | None:
    """The exit code of a command of `rdm`, in this process."""
    from rdm_fast.cli.commands import main  # here: a machine that only trains has no tyro

    with pytest.raises(SystemExit) as ended:
        main([*line.split(), *map(str, words)])
    return ended.value.code


def run_with_stops(path: Path, config: Config, stops: Sequence[int]) -> None:
    """Stop after each of these steps, continue with a new trainer each time, train to the end."""
    for stop in stops:
        run_to(path, config, stop)
    run(path, config)


def run_to(path: Path, config: Config, step: int) -> None:
    """Train from where the folder stands until a stop after this step."""
    with pytest.raises(Interrupted):
        run(path, config, partial(in_step, step=step, action=Trainer.ask_to_stop))
    assert newest(path).name == f"step-{step:08d}"


def in_step(trainer: Trainer, step: int, action: Callable[[Trainer], object]) -> None:
    """Call action(trainer) while step number `step` (from 1) is running."""

    def before(_: Batch, number: int) -> None:
        if number + 1 == step:
            action(trainer)

    trainer.before_step.append(before)


# ---- what is compared ------------------------------------------------------------------------


def metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but for the environment's, without what is measured in time."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in TIMING}
        for line in lines
        if "environment" not in line
    ]


def newest(path: Path) -> Path:
    found = checkpoint.newest(path / "checkpoints", pytest.fail)
    assert found is not None
    return found


def final_state(path: Path) -> dict[str, str]:
    """Every tensor of the newest checkpoint as a digest of its bits, and every plain value."""
    snapshot = checkpoint.load(newest(path))
    values = {"step": str(snapshot.step), **{k: repr(v) for k, v in snapshot.state.items()}}
    for group in ("model", "optim", "extra"):
        for name, tensor in getattr(snapshot, group).items():
            bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            values[f"{group}:{name}"] = f"{tensor.dtype} {hashlib.sha256(bits).hexdigest()[:16]}"
    return values


def losses(path: Path) -> list[float]:
    return [line["loss"] for line in metrics(path) if "loss" in line]


# ---- how far rounding alone carries a run ----------------------------------------------------


def nudge(trainer: Trainer, seed: int) -> None:
    """Move every weight to one of its two neighbors in float32, before every step."""
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def before(*_: object) -> None:
        for weight in trainer.train_step.method.parameters():
            up = torch.randint(2, weight.shape, generator=generator) * 2 - 1
            weight.copy_(torch.nextafter(weight, up * torch.full_like(weight, math.inf)))

    trainer.before_step.append(before)


def rounding_band(path: Path, config: Config, seeds: int = 6) -> list[tuple[float, float]]:
    """(loss, tolerance) of every logged step of a run on one rank.

    Training amplifies rounding, so no fixed tolerance fits both the first step and the last. The
    same run is repeated with every weight moved by one unit in the last place before every step;
    up to each step, the largest deviation of its losses, times SAFETY, is what a sum in another
    order may make of them; but never less than SAFETY times one unit for each layer, since every
    one of them rounds too, and a loss is a mean of cosines.
    """
    run(path / "exact", config)
    exact = losses(path / "exact")
    worst = [LAYERS * torch.finfo(torch.float32).eps] * len(exact)
    for seed in range(seeds):
        run(path / f"nudged-{seed}", config, lambda trainer, seed=seed: nudge(trainer, seed))
        for k, loss in enumerate(losses(path / f"nudged-{seed}")):
            worst[k] = max(worst[k], abs(loss - exact[k]), worst[k - 1] if k else 0.0)
    return [(loss, SAFETY * deviation) for loss, deviation in zip(exact, worst, strict=True)]


def outside(found: Sequence[float], band: Sequence[tuple[float, float]]) -> list[str]:
    """The steps, from 1, whose loss differs by more than its tolerance."""
    return [
        f"step {k}: {loss} instead of {exact} within {tolerance:.1e}"
        for k, (loss, (exact, tolerance)) in enumerate(zip(found, band, strict=True), start=1)
        if not abs(loss - exact) <= tolerance
    ]
