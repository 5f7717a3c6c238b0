"""Command line of `eval_linear`. Nothing here imports torch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from rdm_fast.config import Precision, Stem
from rdm_fast.config.checks import Between, Seed, require, require_fields
from rdm_fast.config.flags import Alias, Shape
from rdm_fast.config.model import PatchSize, check_backbone
from rdm_fast.config.recipes import RECIPES
from rdm_fast.config.run import Branch
from rdm_fast.errors import UsageError
from rdm_fast.evaluation.protocols import AUTO, FINETUNE, ITERATED, PROTOCOLS, Protocol
from rdm_fast.runtime.launcher import check_nproc

Statistics = Literal["own", "online", "recompute"]
FEATURE_SUFFIXES = (".npz", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Score a backbone by a linear probe and kNN."""

    checkpoint: Annotated[str, Shape.POSITIONAL]
    """A run folder (its newest checkpoint), one step folder inside its checkpoints, or a file of
    weights from this or another trainer."""
    branch: Literal[Branch, "auto"] = "auto"
    """For a run whose method keeps target weights (EMA): the branch to evaluate; auto takes the
    method's."""
    bn: Statistics = "own"
    """Statistics of the batch norms: own as the branch kept them in training, online those of the
    online branch, recompute those of the training images as evaluation shows them, in batches of
    --batch."""
    protocol: str = "auto"
    """Linear probe on frozen features, by name; auto chooses by data set."""
    epochs: Annotated[int, Between(0, 10**6)] = 0
    """Passes over the training images; 0 takes the protocol's."""
    lr: Annotated[float, Between(0, 1e6)] = 0.0
    """Learning rate of the first epoch; 0 takes the protocol's."""
    augment: bool = False
    """Train the probe on a new random crop and flip of each image in every epoch, as the published
    protocols do, instead of on cached features."""
    finetune: bool = False
    """Train the backbone too, from the checkpoint, on random crops and flips."""
    layer_decay: Annotated[float, Between(0, 1, above=True)] = 1.0
    """Factor of the learning rate from one layer of the backbone to the one below, for --finetune:
    a ViT's blocks, a ResNet's stages. 1 trains all layers at one rate."""
    recipe: str = ""
    """For a file of weights: the recipe whose data set and views to use."""
    arch: str = "auto"
    """For a file of weights: its backbone, as in --model.backbone; auto reads it from the file."""
    stem: Literal[Stem, "auto"] = "auto"
    """For a file of weights: its first layers. Tensors do not distinguish the 3x3 ones: auto takes
    what files of rdm-fast note, else cifar_pad2 for solo-learn and cifar for others."""
    patch_size: PatchSize = 0
    """For a file of a timm model: the side of its patches in pixels; 0 reads it from the file."""
    prefix: str | None = None
    """For a file of weights in an unknown layout: the prefix of the backbone's tensor names."""
    features_out: str = ""
    """Also write embeddings and labels of both sets to this new .npz or .safetensors file."""
    out: str = ""
    """Folder for cached embeddings and results; by default evaluation/ in the run folder, or
    FILE-evaluation beside a file of weights."""
    data_root: str | None = None
    """Where the data set is now, if not where the run found it."""
    workers: Annotated[int, Between(-1, 256), Alias("--data.workers")] = -1
    """Worker processes that decode images, on each rank; -1 takes those of the run or recipe."""
    batch: Annotated[int, Between(1, 2**20)] = 256
    """Images in one forward pass of the backbone, on each rank."""
    precision: Literal[Precision, "auto"] = "auto"
    """Arithmetic of the backbone; auto takes that of the run or recipe."""
    seed: Seed = 0
    """Seed of the probe."""
    nproc: str = "1"
    """Ranks to start on this machine: a number, gpu (one for each GPU), or auto (gpu, or 1 without
    GPUs)."""
    timeout: Annotated[float, Between(1, 86400), Alias("--parallel.timeout")] = 600.0
    """Seconds that a rank waits for the others before it takes one for lost (code 76)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU if there is one."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        check_nproc(self.nproc)
        require_fields("--", self)
        if self.arch != "auto":
            check_backbone("--arch", self.arch)
        require(
            self.protocol in ("auto", *PROTOCOLS),
            f"protocol={self.protocol} is unknown: use auto, {_or(PROTOCOLS)}",
        )
        require(
            not self.recipe or self.recipe in RECIPES,
            f"recipe={self.recipe} is unknown: use {_or(RECIPES)}",
        )
        require(
            self.bn != "recompute" or self.batch > 1,
            "--bn recompute with --batch 1: a batch norm needs two images, give a larger --batch",
        )
        require(
            not self.finetune or (self.protocol == "auto" and not self.augment),
            "finetune has its own protocol: leave out protocol and augment",
        )
        require(
            self.finetune or self.layer_decay == 1,
            f"--layer-decay {self.layer_decay} is for fine-tuning: add --finetune, or leave it out",
        )
        require(
            not self.finetune or self.precision != "fp16",
            "finetune with precision=fp16 has no loss scaling: use bf16 or fp32",
        )
        require(
            not self.features_out or Path(self.features_out).suffix in FEATURE_SUFFIXES,
            f"features_out={self.features_out}: name a file {_or(FEATURE_SUFFIXES)}",
        )

    def protocol_for(self, data: str) -> Protocol:
        """The protocol for a data set, with this command's changes.

        Raises:
            UsageError: epochs, lr or augment are given for a protocol without epochs.
        """
        if self.finetune:
            protocol = FINETUNE
        elif self.protocol != "auto":
            protocol = PROTOCOLS[self.protocol]
        else:
            name = "reference-cifar" if self.augment else AUTO.get(data, "reference-cifar")
            protocol = PROTOCOLS[name]
        has_rate = protocol.solver in ITERATED
        for flag, given, allowed in (
            ("--augment", self.augment, has_rate),
            ("--lr", self.lr > 0, has_rate),
            ("--epochs", self.epochs > 0, protocol.epochs > 0),
        ):
            if given and not allowed:
                iterated = [p.name for p in PROTOCOLS.values() if p.solver in ITERATED]
                raise UsageError(
                    f"{flag} is for protocols that train in epochs, and {protocol.name} does not: "
                    f"use --protocol {_or(iterated)}"
                )
        return replace(
            protocol,
            epochs=self.epochs or protocol.epochs,
            lr=self.lr or protocol.lr,
            layer_decay=self.layer_decay,
        )


def _or(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"
