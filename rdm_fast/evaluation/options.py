"""What `eval_linear` can be asked to do. Nothing here imports torch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from rdm_fast.config import BackboneName, Precision, Stem
from rdm_fast.config.parallel import check_nproc
from rdm_fast.config.recipes import RECIPES
from rdm_fast.errors import UsageError
from rdm_fast.evaluation.protocols import FINETUNE, ITERATED, PROTOCOLS, Protocol, find_protocol

FEATURE_SUFFIXES = (".npz", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """What `eval_linear` was asked to do."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder (its newest checkpoint), one step folder inside its checkpoints, or a file of
    weights of this or another trainer."""
    protocol: str = "auto"
    """Linear probe on frozen features, by name; auto chooses by data set."""
    epochs: int = 0
    """Passes over the training images, for protocols that have them; 0 takes the protocol's."""
    lr: float = 0.0
    """Learning rate of the first epoch, for such protocols; 0 takes the protocol's."""
    augment: bool = False
    """Train the probe on random crops and flips, embedded anew in every epoch, as the published
    protocols do, instead of on cached features."""
    finetune: bool = False
    """Train the backbone too, from the checkpoint, on random crops and flips."""
    recipe: str = ""
    """Of a file of weights: the recipe whose data set and views it is evaluated with."""
    arch: Literal[BackboneName, "auto"] = "auto"
    """Of a file of weights: its backbone, which auto reads from the tensors."""
    stem: Literal[Stem, "auto"] = "auto"
    """Of a file of weights: its first layers. Tensors do not tell cifar from cifar_pad2: auto takes
    what an export noted, else cifar_pad2 for solo-learn and cifar for others."""
    prefix: str | None = None
    """Of a file of weights: what the names of the backbone's tensors begin with, if that is no
    layout known here."""
    features_out: str = ""
    """Also write embeddings and labels of both sets to this new .npz or .safetensors file."""
    out: str = ""
    """Folder of cached embeddings and results; by default evaluation/ in the run folder, or FILE's
    name with -evaluation beside a file of weights."""
    data_root: str | None = None
    """Where the data set is now, if not where the run found it."""
    batch: int = 256
    """Images in one forward pass of the backbone, on each rank."""
    precision: Literal[Precision, "auto"] = "auto"
    """Arithmetic of the backbone; auto takes that of the run or recipe."""
    seed: int = 0
    """Seed of the probe."""
    nproc: str = "1"
    """Ranks to start on this machine: a number, gpu (one a GPU), or auto (gpu, or 1 without)."""
    device: str = "auto"
    """auto, cpu or cuda."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        check_nproc(self.nproc)
        if self.protocol != "auto" and self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self.protocol} is unknown: use auto, {_or(PROTOCOLS)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device} is unknown: use auto, cpu or cuda")
        if self.recipe and self.recipe not in RECIPES:
            raise ValueError(f"recipe={self.recipe} is unknown: use {_or(RECIPES)}")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: give 1 or more images")
        if self.epochs < 0 or self.lr < 0:
            raise ValueError(
                f"epochs={self.epochs} and lr={self.lr}: give numbers above 0, or leave them out"
            )
        if self.finetune and (self.augment or self.protocol != "auto"):
            raise ValueError("finetune has a protocol of its own: leave out protocol and augment")
        if self.finetune and self.precision == "fp16":
            raise ValueError("finetune with precision=fp16 has no loss scaling: use bf16 or fp32")
        if self.features_out and Path(self.features_out).suffix not in FEATURE_SUFFIXES:
            raise ValueError(
                f"features_out={self.features_out}: name a file {_or(FEATURE_SUFFIXES)}"
            )

    def protocol_for(self, data: str) -> Protocol:
        """The protocol that is meant, for a data set.

        Raises:
            UsageError: epochs, lr or augment are given to one that is not trained in epochs.
        """
        if self.finetune:
            protocol = FINETUNE
        elif self.augment and self.protocol == "auto":
            protocol = PROTOCOLS["reference-cifar"]
        else:
            protocol = find_protocol(self.protocol, data)
        changes: dict[str, float] = {}
        if self.epochs:
            changes["epochs"] = self.epochs
        if self.lr:
            changes["lr"] = self.lr
        if (self.augment or "lr" in changes) and protocol.solver not in ITERATED:
            raise UsageError(
                f"--augment and --lr are for protocols that are trained in epochs, and "
                f"{protocol.name} is not: use --protocol {_or(_iterated())}"
            )
        if changes and protocol.epochs == 0:
            raise UsageError(
                f"--epochs: {protocol.name} is not trained in epochs; "
                f"use --protocol {_or(_iterated())}"
            )
        return replace(protocol, **changes)  # type: ignore[arg-type]


def _iterated() -> list[str]:
    return [name for name, protocol in PROTOCOLS.items() if protocol.solver in ITERATED]


def _or(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"
