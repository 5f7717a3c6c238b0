"""Loading a checkpoint into a trainer's parts, each field and tensor checked first."""

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch

from rdm_fast.config import Config
from rdm_fast.config.filter import Engine
from rdm_fast.data import ImageSet
from rdm_fast.errors import DataError, InputMissing
from rdm_fast.models.weight_files import load_strict
from rdm_fast.optim import state_keys
from rdm_fast.run import checkpoint, schema
from rdm_fast.run.folder import RunFolder, read_status
from rdm_fast.run.schema import Schema
from rdm_fast.run.state import Stateful, restore_optimizer, restore_parts
from rdm_fast.runtime.distributed import all_reduce_max, print0, rank
from rdm_fast.training.train_step import TrainStep

PARTS: dict[str, Schema] = {
    "skipped": {"total": schema.whole(), "in_a_row": schema.whole()},
    "collapse_guard": {"low": schema.whole()},
    "filter_engine": {
        "name": schema.one_of((None, *get_args(Engine))), "failures": schema.whole()
    },
}  # fmt: skip
"""Plain values of the parts of a run, by name."""
SCALER: Schema = {
    **dict.fromkeys(("scale", "growth_factor", "backoff_factor"), schema.POSITIVE),
    **dict.fromkeys(("growth_interval", "_growth_tracker"), schema.whole()),
}
"""Those of torch's GradScaler."""


def newest(folder: RunFolder, device: torch.device) -> Path | None:
    """The newest sound checkpoint of a run, or None if it never wrote one.

    Raises:
        InputMissing: its checkpoints are gone, or the ranks do not all see them.
    """
    path = checkpoint.newest(
        folder.checkpoints, lambda text: print0(f"warning: {text}"), sweep=rank() == 0
    )
    step = -1 if path is None else int(path.name.split("-")[1].split(".")[0])
    if all_reduce_max(step, device) != step:
        raise InputMissing(
            f"rank {rank()} does not see the checkpoints of the other ranks in {folder.path}: "
            "--out must be a folder that all ranks share"
        )
    if path is None:
        checkpoint.require_none(folder.checkpoints, read_status(folder.path)["checkpoint"])
    return path


def restore(
    path: Path,
    train_step: TrainStep,
    parts: Mapping[str, Stateful],
    images: ImageSet,
    config: Config,
) -> int:
    """Load a checkpoint and torch's random generator; returns the step.

    Args:
        path: a step folder of the run.
        train_step, parts: take the saved state.
        images: must be those that the run began with.
        config: of the run.

    Raises:
        DataError: the checkpoint is damaged, or a field or tensor in it is not what it must be.
        ConfigMismatch: the images are others.
    """
    snapshot = checkpoint.load(path)
    what = f"checkpoint {path}"
    scaler = SCALER if config.precision == "fp16" else None
    fields = {name: schema.table(PARTS[name]) for name in parts if name in PARTS}
    fields |= {"scaler": schema.table(scaler), "optimizer": schema.table(), "data": schema.SHA256}
    for name, inner in (*PARTS.items(), ("scaler", scaler or {})):
        if name in parts and isinstance(snapshot.state.get(name), dict):
            schema.require(snapshot.state[name], inner, f"{what}: {name} in state.json")
    schema.require(snapshot.state, fields, f"{what}: state.json")
    images.require_digest(snapshot.state["data"], path.parent.parent, config.data.root)
    if snapshot.step > train_step.total_steps:
        raise DataError(
            f"{what} is of step {snapshot.step}, and the run ends at step "
            f"{train_step.total_steps}: use an older checkpoint, or raise optim.epochs"
        )
    method = train_step.method
    load_strict(method, snapshot.model, what)
    plain = snapshot.state["optimizer"]
    wanted = state_keys(config.optim) if snapshot.step else set()
    named = method.named_parameters()
    restore_optimizer(train_step.optimizer, named, snapshot.optim, plain, wanted)
    restore_parts(parts, snapshot)
    _restore_generator(snapshot.extra, what)
    return snapshot.step


def _restore_generator(extra: Mapping[str, torch.Tensor], what: str) -> None:
    try:
        if extra["torch_rng"].shape != torch.get_rng_state().shape:
            raise ValueError("another number of bytes")
        torch.set_rng_state(extra["torch_rng"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{what}: extra.safetensors has no torch_rng that torch's random generator can take "
            "up: use an older checkpoint beside it"
        ) from error
