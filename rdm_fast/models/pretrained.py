"""Pretrained backbones from the checkpoints of any trainer, and strict loading of weights.

Reading is strict: every tensor of the backbone must be there in its shape, the first convolution
must be the model's, and tensors that are left out are counted. Files are safetensors, or pickles
from which torch reads tensors only.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdm_fast.config import RESNETS, TIMM, Config, ModelConfig, Stem
from rdm_fast.errors import DataError
from rdm_fast.models.backbone import build_backbone
from rdm_fast.models.layouts import Layout, find_layout
from rdm_fast.models.pretrained_timm import PretrainedTimm
from rdm_fast.models.weight_files import METADATA, load_strict, read_tables
from rdm_fast.runtime.distributed import print0, world_size
from rdm_fast.runtime.printing import warn

DEPTHS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((1, 1, 1), False): "resnet8",
}
"""Blocks of each stage, and whether they are bottlenecks."""


@dataclass(frozen=True, slots=True)
class PretrainedBackbone:
    """A backbone read from a file.

    Attributes:
        path: the file.
        layout: how it names tensors.
        tensors: by torchvision's names.
        backbone, width, channels: its architecture; `width` is the channels of the first stage.
        sizes: of its images; a ResNet takes any.
        stem: of three 3 x 3 stems with weights of one shape, the one that the file notes, that its
            trainer has, or cifar.
        stem_source: which of these it is; empty if the file notes it, or there is no choice.
        ignored: number of tensors outside the backbone, by module.
        said: what was peeled off, and where else the file has a backbone; empty if nothing was.
    """

    path: Path
    layout: Layout
    tensors: dict[str, Tensor]
    backbone: str
    stem: Stem
    stem_source: str
    width: int
    channels: int
    ignored: dict[str, int]
    said: str
    sizes: tuple[int, ...] = (224,)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of ModelConfig that build it."""
        layers = {"stem": self.stem, "width": self.width, "patch_size": 0, "frozen_patch": False}
        return {"backbone": self.backbone, **layers}

    def require(
        self, model: ModelConfig, channels: int, sizes: Sequence[int] = (224,),
        stem_flag: str = "--model.stem",
    ) -> None:  # fmt: skip
        """Refuse a model whose backbone has other layers than the file's.

        Args:
            model: the one that would take the weights.
            channels, sizes: of its images, as in `build_backbone`.
            stem_flag: the flag that set its stem.

        Raises:
            DataError: it is another ResNet, has another stem, or takes other channels.
        """
        if model.backbone != self.backbone:
            raise DataError(
                f"{self.path} is a {self.backbone} and the model a {model.backbone}: use "
                f"--arch {self.backbone}"
            )
        if (model.stem == "imagenet") != (self.stem == "imagenet"):
            raise DataError(
                f"{self.path} has the first convolution of {stem_flag} {self.stem} and the model "
                f"that of {model.stem}: use {stem_flag} {self.stem}"
            )
        if channels != self.channels:
            raise DataError(
                f"{self.path} is a backbone for images of {self.channels} channel(s), and these "
                f"have {channels}: use images like those it was trained on"
            )

    def stem_note(self, stem: Stem, flag: str) -> str:
        """A line on a stem that the tensors do not confirm; empty if there is no doubt.

        Args:
            stem: the one that is used.
            flag: changes it.
        """
        same = stem == self.stem
        if not self.stem_source:
            return "" if same else f"{self.path} was trained with {flag} {self.stem}, not {stem}"
        source = f"{'which' if same else f'while {self.stem}'} is {self.stem_source}"
        return (
            f"{self.path} does not record the padding of its first convolution: it is read as "
            f"{flag} {stem}, {source}; give {flag} if that is wrong"
        )

    def load_into(self, module: nn.Module) -> str:
        """Fill a backbone of this project; returns a sentence on what was loaded.

        Raises:
            DataError: a tensor is missing, unknown or of another shape; all are counted.
        """
        state, own = dict(self.tensors), module.state_dict()
        counters = [name for name in own if name.endswith("num_batches_tracked")]
        absent = [name for name in counters if name not in state]
        if len(absent) == len(counters):  # files from before torch 0.4.1 have none
            state |= {name: torch.zeros_like(own[name]) for name in absent}
        what = f"{self.path} (read as {self.layout.name}'s {self.backbone})"
        count = load_strict(module, state, what) - (len(state) - len(self.tensors))
        text = f"{self.path}: {self.layout.name} layout, loaded {count} of {len(own)} tensors"
        if count < len(own):
            text += f" ({len(own) - count} batch counters, absent in old files, are 0)"
        if self.said:
            text += f"; {self.said}"
        if self.ignored:
            each = ", ".join(f"{name} {n}" for name, n in self.ignored.items())
            text += f"; ignored {sum(self.ignored.values())}: {each}"
        return text


def read_backbone(
    path: Path, prefix: str | None = None, arch: str = ""
) -> PretrainedBackbone | PretrainedTimm:
    """Find the backbone in a checkpoint of any trainer in LAYOUTS, or a model of timm.

    Args:
        path: as `read_tables` takes it.
        prefix: of the names of the backbone's tensors; found if None.
        arch: the backbone that is expected. One of timm's needs it, unless the file notes it.

    Raises:
        InputMissing: there is no such file.
        DataError: it cannot be read as data alone, or holds no ResNet under a known prefix.
    """
    tables, notes = read_tables(path)
    name = arch if arch.startswith(TIMM) else str(notes.get("backbone", ""))
    if name.startswith(TIMM):
        return PretrainedTimm(path, tables, prefix, name, notes)
    found = find_layout(path, tables, prefix)
    layout, tensors = found.layout, found.tensors
    body = {new: t for name, t in tensors.items() if (new := layout.rename(name)) is not None}
    ignored = Counter(
        name.removeprefix(layout.prefix).removeprefix("module.").partition(".")[0]
        for name in tensors
        if layout.rename(name) is None
    )
    conv1, backbone = body["conv1.weight"], _backbone(path, body)
    stem, stem_source = _stem(conv1, backbone, layout, notes)
    if notes:
        layout = replace(layout, name="rdm-fast")
    (width, channels), body = conv1.shape[:2], _unsplit(body)
    return PretrainedBackbone(
        path, layout, body, backbone, stem, stem_source, width, channels, dict(ignored), found.said
    )


def load_backbone(
    path: str | Path, stem: Stem | None = None, prefix: str | None = None
) -> nn.Module:
    """The backbone in a file, ready to embed: [B, C, H, W] -> [B, d_emb], in evaluation mode.

    Args:
        path: a file as `read_backbone` takes it.
        stem: its first layers. If None, what the file notes or its trainer has; where that is not
            certain, a warning says which stem is used.
        prefix: of the names of the backbone's tensors; found if None.

    Raises:
        InputMissing, DataError: as `read_backbone`.
    """
    found = read_backbone(Path(path), prefix)
    if stem is None and (note := found.stem_note(found.settings["stem"], "stem")):
        warn(note, stacklevel=2)
    model = ModelConfig(**found.settings | ({"stem": stem} if stem else {}))
    found.require(model, found.channels, found.sizes, "stem")
    module, _ = build_backbone(model, found.channels, found.sizes)
    found.load_into(module)
    return module.eval()


def warm_start(method: nn.Module, config: Config) -> None:
    """Begin a run with the backbone in the file model.init; target weights begin equal to it.

    Weights are broadcast from rank 0.

    Args:
        method: from `build_method`.
        config: of the run; without `model.init`, nothing is done.

    Raises:
        InputMissing, DataError: as `read_backbone`, or the file's backbone is another one.
    """
    model = config.model
    if not model.init:
        return
    found = read_backbone(Path(model.init), model.init_prefix or None, model.backbone)
    found.require(model, config.augment.channels, config.augment.sizes)
    if note := found.stem_note(model.stem, "--model.stem"):
        print0(f"warning: {note}")
    for name in ("backbone", "target_backbone"):
        if hasattr(method, name):
            text = found.load_into(getattr(method, name))
    print0(f"warm start: {text}")
    if world_size() > 1:
        for tensor in method.state_dict().values():
            dist.broadcast(tensor, 0)


def file_note(config: Config) -> dict[str, str]:
    """What a file of a run's weights must say: METADATA with its text."""
    return {METADATA: json.dumps(backbone_note(config))}


def backbone_note(config: Config) -> dict[str, Any]:
    """What it takes to build a run's backbone again, and tensors do not show."""
    model, augment = config.model, config.augment
    layers = {"patch_size": model.patch_size} if model.timm_name else {"stem": model.stem}
    size = (augment.channels, augment.size, augment.size)
    return {"backbone": model.backbone, **layers, "input_size": size}


# ---- architecture --------------------------------------------------------------------------


def _backbone(path: Path, body: dict[str, Tensor]) -> str:
    blocks = {m.groups() for name in body if (m := re.match(r"layer(\d)\.(\d+)\.", name))}
    stages = Counter(stage for stage, _ in blocks)
    depths = tuple(stages[stage] for stage in sorted(stages))
    bottleneck = "layer1.0.conv3.weight" in body
    if (depths, bottleneck) not in DEPTHS:
        known = ", ".join(RESNETS)
        raise DataError(
            f"{path} has {'-'.join(map(str, depths))} {'bottlenecks' if bottleneck else 'blocks'} "
            f"in its stages, as none of {known}: use a checkpoint of one of these"
        )
    return DEPTHS[depths, bottleneck]


def _stem(conv1: Tensor, backbone: str, layout: Layout, notes: dict[str, Any]) -> tuple[Stem, str]:
    """The stem and its source: see PretrainedBackbone."""
    if notes.get("stem") in get_args(Stem):
        return cast(Stem, notes["stem"]), ""
    if conv1.shape[-1] != 3:
        return "imagenet", ""
    if backbone == "resnet8":
        return "cifar", ""
    if layout.stem == "cifar_no_relu":  # only lightly's ResNetGenerator is laid out like that
        return layout.stem, ""
    return layout.stem or "cifar", f"{layout.name}'s" if layout.stem else "an assumption"


def _unsplit(body: dict[str, Tensor]) -> dict[str, Tensor]:
    """The statistics of lightly's SplitBatchNorm, one row a split, as their mean: what it uses in
    evaluation mode. All others stay as they are."""
    merged = dict(body)
    for name, tensor in body.items():
        module, _, last = name.rpartition(".")
        weight = body.get(f"{module}.weight")
        if last in ("running_mean", "running_var") and weight is not None and tensor.ndim == 1:
            splits, rest = divmod(len(tensor), len(weight))
            if splits > 1 and rest == 0:
                merged[name] = tensor.view(splits, -1).mean(0)
    return merged
