"""Pretrained backbones from the checkpoints of other trainers, and strict loading of weights.

A ResNet has torchvision's tensor names everywhere, behind a prefix that identifies the trainer:

    torchvision, timm     conv1.weight                   SimSiam       module.encoder.conv1.weight
    solo-learn, rdm-fast  backbone.conv1.weight          MoCo          module.encoder_q.conv1.weight
    lightly               backbone.0.weight: an nn.Sequential of the ResNet's children

Reading is strict: every tensor of the backbone must be there in its shape, the first convolution
must be the model's, and tensors that are left out are counted. Files are safetensors, or pickles
from which torch reads tensors only.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rdm_fast.config import BackboneName, ModelConfig, Stem
from rdm_fast.errors import DataError, InputMissing
from rdm_fast.models.backbone import build_backbone
from rdm_fast.runtime.distributed import print0, world_size

METADATA = "rdm_fast"
"""Key of a safetensors file's header: JSON that `rdm_fast.tools.export` writes."""
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Positions of a torchvision ResNet's children in an nn.Sequential; the others have no weights."""
BODY = tuple(CHILDREN.values())
FIRST_BLOCK = "layer1.0.conv1.weight"
DEPTHS: dict[tuple[tuple[int, ...], bool], BackboneName] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((1, 1, 1), False): "resnet8",
}
"""Blocks of each stage, and whether they are bottlenecks."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a trainer names the tensors of its backbone."""

    name: str
    prefix: str
    is_sequential: bool = False

    def rename(self, name: str) -> str | None:
        """torchvision's name of a tensor; None for one outside the backbone."""
        if not name.startswith(self.prefix):
            return None
        child, _, rest = name.removeprefix(self.prefix).partition(".")
        child = CHILDREN.get(child, "") if self.is_sequential else child
        return f"{child}.{rest}" if child in BODY else None


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("torchvision", ""),
        Layout("SimSiam", "module.encoder."),
        Layout("MoCo", "module.encoder_q."),
        Layout("MoCo v3", "module.base_encoder."),
        Layout("solo-learn", "backbone."),
        Layout("lightly", "backbone.", is_sequential=True),
        Layout("old solo-learn", "encoder."),
        Layout("DataParallel", "module."),
    )
}
"""Layouts that are recognized; any other prefix can be given."""


@dataclass(frozen=True, slots=True)
class PretrainedBackbone:
    """A backbone read from a file.

    Attributes:
        path: the file.
        layout: how it names tensors.
        tensors: by torchvision's names.
        backbone, width, channels: its architecture; `width` is the channels of the first stage.
        stem: cifar and cifar_pad2 have weights of one shape; solo-learn's is cifar_pad2, and a
            file exported by rdm-fast names its own.
        ignored: number of tensors outside the backbone, by module.
    """

    path: Path
    layout: Layout
    tensors: dict[str, Tensor]
    backbone: BackboneName
    stem: Stem
    width: int
    channels: int
    ignored: dict[str, int]

    def require(self, model: ModelConfig, channels: int, stem_flag: str = "--model.stem") -> None:
        """Refuse a model whose backbone has other layers than the file's.

        Args:
            model: the one that would take the weights.
            channels: of its images.
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
        if self.ignored:
            each = ", ".join(f"{name} {n}" for name, n in self.ignored.items())
            text += f"; ignored {sum(self.ignored.values())}: {each}"
        return text


def read_backbone(path: Path, prefix: str | None = None) -> PretrainedBackbone:
    """Find the backbone in a checkpoint of any trainer in LAYOUTS.

    Args:
        path: a .safetensors file, or a file from torch.save with tensors by name, at the top or
            under `state_dict` or `model`.
        prefix: of the names of the backbone's tensors; found if None.

    Raises:
        InputMissing: there is no such file.
        DataError: it cannot be read as data alone, or holds no ResNet under a known prefix.
    """
    tensors, notes = _read(path)
    layout = _layout(path, tensors, prefix)
    body = {new: t for name, t in tensors.items() if (new := layout.rename(name)) is not None}
    ignored = Counter(
        name.removeprefix(layout.prefix).removeprefix("module.").partition(".")[0]
        for name in tensors
        if layout.rename(name) is None
    )
    conv1, backbone = body["conv1.weight"], _backbone(path, body)
    if notes:
        layout = replace(layout, name="rdm-fast")
    stem = cast(Stem, notes.get("stem"))
    if stem not in get_args(Stem):
        is_padded = "solo-learn" in layout.name and backbone != "resnet8"
        stem = "imagenet" if conv1.shape[-1] != 3 else "cifar_pad2" if is_padded else "cifar"
    width, channels = conv1.shape[:2]
    return PretrainedBackbone(path, layout, body, backbone, stem, width, channels, dict(ignored))


def load_backbone(path: str | Path) -> nn.Module:
    """The backbone in a file, ready to embed: [B, C, H, W] -> [B, d_emb], in evaluation mode.

    Raises:
        InputMissing, DataError: as `read_backbone`.
    """
    found = read_backbone(Path(path))
    model = ModelConfig(backbone=found.backbone, stem=found.stem, width=found.width)
    module, _ = build_backbone(model, found.channels)
    found.load_into(module)
    return module.eval()


def warm_start(method: nn.Module, model: ModelConfig, channels: int) -> None:
    """Begin a run with the backbone in the file model.init; target weights begin equal to it.

    Weights are broadcast from rank 0.

    Args:
        method: from `build_method`.
        model: of the run; without `init`, nothing is done.
        channels: of the images.

    Raises:
        InputMissing, DataError: as `read_backbone`, or the file's backbone is another one.
    """
    if not model.init:
        return
    found = read_backbone(Path(model.init))
    found.require(model, channels)
    for name in ("backbone", "target_backbone"):
        if hasattr(method, name):
            text = found.load_into(getattr(method, name))
    print0(f"warm start: {text}")
    if world_size() > 1:
        for tensor in method.state_dict().values():
            dist.broadcast(tensor, 0)


def load_strict(module: nn.Module, state: dict[str, Tensor], what: str) -> int:
    """Load weights only if every name and shape fits; returns how many tensors were loaded.

    Args:
        module: keeps its weights untouched on failure.
        state: tensors by the module's own names.
        what: origin of the weights, such as `checkpoint runs/a/checkpoints/step-00000070`.

    Raises:
        DataError: with the numbers of matching, missing, unknown and misshapen tensors.
    """
    own = module.state_dict()
    wrong = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(wrong.values()):
        matching = len(own) - len(wrong["missing"]) - len(wrong["of another shape"])
        each = ", ".join(
            f"{len(names)} {kind} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
            for kind, names in wrong.items()
            if names
        )
        raise DataError(
            f"{what} is of another architecture: {matching} of this model's {len(own)} tensors "
            f"match, {each}; use the configuration it was trained with"
        )
    module.load_state_dict(state)
    return len(own)


# ---- files -----------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the metadata that `rdm_fast.tools.export` wrote with them."""
    if not path.is_file():
        raise InputMissing(f"there is no file {path}: name a checkpoint")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                notes = json.loads((file.metadata() or {}).get(METADATA, "{}"))
                return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} is not a sound safetensors file ({error})") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0].strip()[:120]
        raise DataError(
            f"{path} cannot be read as data alone ({reason}): where you trust it, save only its "
            "tensors, with torch.save(checkpoint['state_dict'], NEW_FILE)"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}: use a file of tensors by name")
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return tensors, {}


# ---- names -----------------------------------------------------------------------------------


def _layout(path: Path, tensors: dict[str, Tensor], prefix: str | None) -> Layout:
    candidates = list(LAYOUTS.values())
    if prefix is not None:
        named = [layout for layout in candidates if layout.prefix == prefix]
        candidates = named or [Layout(f"--prefix {prefix}", prefix)]
        candidates.append(Layout(f"--prefix {prefix}", prefix, is_sequential=True))
    for layout in candidates:
        renamed = {layout.rename(name) for name in tensors}
        if {"conv1.weight", FIRST_BLOCK} <= renamed:
            return layout
    found = f"{path}: none of its {len(tensors)} tensors is a ResNet's under a known prefix"
    if prefix is not None:
        under = sum(name.startswith(prefix) for name in tensors)
        found = (
            f"{path}: {under} of its {len(tensors)} tensors begin with --prefix {prefix}, and no "
            "ResNet is among them"
        )
    known = ", ".join(f"{layout.name} {layout.prefix!r}" for layout in LAYOUTS.values())
    raise DataError(f"{found}{_elsewhere(tensors)}; known prefixes: {known}")


def _elsewhere(tensors: dict[str, Tensor]) -> str:
    """The prefix of a ResNet that is there and the most similar layout; else two tensor names."""
    for ending, is_sequential in ((FIRST_BLOCK, False), ("4.0.conv1.weight", True)):
        for name in tensors:
            if name == ending or name.endswith("." + ending):
                prefix = name.removesuffix(ending)
                count = sum(name.startswith(prefix) for name in tensors)
                near = max(
                    (each for each in LAYOUTS.values() if each.is_sequential == is_sequential),
                    key=lambda layout: _common_ending(layout.prefix, prefix),
                )
                return (
                    f", but {count} begin with {prefix!r} and are (nearest layout: {near.name}, "
                    f"{near.prefix!r}): use --prefix {prefix!r}"
                )
    return f" (they are {', '.join(list(tensors)[:2])}, ...)" if tensors else ""


def _common_ending(one: str, other: str) -> int:
    """Parts, from the last one, that two prefixes share."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _backbone(path: Path, body: dict[str, Tensor]) -> BackboneName:
    blocks = {m.groups() for name in body if (m := re.match(r"layer(\d)\.(\d+)\.", name))}
    stages = Counter(stage for stage, _ in blocks)
    depths = tuple(stages[stage] for stage in sorted(stages))
    bottleneck = "layer1.0.conv3.weight" in body
    if (depths, bottleneck) not in DEPTHS:
        known = ", ".join(get_args(BackboneName))
        raise DataError(
            f"{path} has {'-'.join(map(str, depths))} {'bottlenecks' if bottleneck else 'blocks'} "
            f"in its stages, as none of {known}: use a checkpoint of one of these"
        )
    return DEPTHS[depths, bottleneck]
