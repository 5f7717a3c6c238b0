"""Writing a backbone under the names that another program expects, and how that loads it.

Beside every file lies a short text with the lines of Python that load it; a run with a small
stem has lines there that a plain ResNet needs first. Weights are safetensors, except where the
other program reads nothing but torch.save's format; then tensors alone are in it.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from rdm_fast.config import Config
from rdm_fast.errors import CannotCreate, UsageError
from rdm_fast.evaluation.loaded_backbone import load_method
from rdm_fast.methods import Method
from rdm_fast.models.pretrained import LAYOUTS, METADATA
from rdm_fast.run.folder import read_config, version
from rdm_fast.runtime import atomic_files
from rdm_fast.tools.export.targets import Target

FOLDER = "export"
SUFFIXES: dict[Target, tuple[str, ...]] = {
    "torchvision": (".safetensors",),
    "timm": (".safetensors",),
    "safetensors": (".safetensors",),
    "simsiam": (".pth", ".tar", ".pt"),
    "solo": (".ckpt", ".pth", ".pt"),
    "hf": ("",),
}
"""Of the file, the default one first."""


def export_checkpoint(
    path: Path, target: Target, *, out: Path | None = None, overwrite: bool = False
) -> str:
    """Write the backbone of a checkpoint for another program, and a text that says how to load it.

    Args:
        path: a step folder inside a run folder.
        target: which program.
        out: the file, for hf the folder; by default in the run folder's export/.
        overwrite: replace an earlier export.

    Returns:
        What was written and what has to be known of it, in a few lines.

    Raises:
        UsageError: the target has no such backbone, or `out` has another suffix.
        CannotCreate: there is something at `out` already, or it cannot be written.
        InputMissing, DataError: the checkpoint cannot be used.
    """
    run = path.parent.parent
    config = read_config(run)
    _require_target(target, config)
    suffix = SUFFIXES[target][0]
    out = out if out is not None else run / FOLDER / f"{path.name}-{target}{suffix}"
    if suffix and out.suffix not in SUFFIXES[target]:
        raise UsageError(f"--out {out}: --to {target} writes a file *{suffix}")
    file = _File(out, target, config)
    files = file.contents(load_method(path, config), step=int(path.name.split("-")[1]))
    _write(files, overwrite)
    plain = "" if not file.preparation else f"; a plain {config.model.backbone} needs first:"
    lines = [f"wrote {out}: {config.model.backbone} with stem {config.model.stem}{plain}"]
    lines += [f"    {line}" for line in file.preparation]
    lines += [f"note: {note}" for note in file.notes]
    lines += [f"how to load it: {next(name for name in files if name.suffix == '.md')}"]
    return "\n".join(lines)


def _require_target(target: Target, config: Config) -> None:
    model = config.model
    if target != "safetensors" and model.backbone == "resnet8":
        raise UsageError(
            f"--to {target} has no resnet8, a backbone that exists only here: "
            "use --to safetensors, which rdm_fast.load_backbone reads"
        )
    if target == "hf" and model.stem != "imagenet":
        raise UsageError(
            f"--to hf is a folder from which timm builds the model, and timm builds no "
            f"{model.backbone} with stem {model.stem}: use --to timm, and the lines it prints"
        )


def _write(files: dict[Path, bytes], overwrite: bool) -> None:
    present = [str(path) for path in files if path.exists()]
    if present and not overwrite:
        raise CannotCreate(f"{present[0]} exists: add --overwrite, or give another --out")
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.replace(path, content)
        except OSError as error:
            raise CannotCreate(f"{path} cannot be written ({error.strerror}): --out") from error


@dataclass(frozen=True, slots=True)
class _File:
    """One export: `out` for `target`, of a run with `config`."""

    out: Path
    target: Target
    config: Config

    @property
    def preparation(self) -> list[str]:
        """What has to be changed in a plain ResNet before it can take the weights."""
        model, channels = self.config.model, self.config.augment.channels
        if self.target in ("safetensors", "hf"):
            return []
        lines = []
        if model.stem != "imagenet":
            padding = 1 if model.stem == "cifar" else 2
            lines += [
                f"model.conv1 = torch.nn.Conv2d({channels}, 64, 3, padding={padding}, bias=False)",
                "model.maxpool = torch.nn.Identity()",
            ]
        elif channels != 3:
            convolution = f"Conv2d({channels}, 64, 7, stride=2, padding=3, bias=False)"
            lines += [f"model.conv1 = torch.nn.{convolution}"]
        return lines

    @property
    def notes(self) -> list[str]:
        """What a user of the other program may be surprised by."""
        stem = self.config.model.stem
        if self.target == "simsiam" and stem != "imagenet":
            return ["main_lincls.py builds the 7x7 stem; change its model as above"]
        if self.target == "solo" and stem == "cifar":
            return [
                "solo-learn pads the first convolution by 2 and this run by 1: it loads there, "
                "but embeds differently; set padding=1 in its main_linear.py"
            ]
        return []

    def contents(self, method: Method, step: int) -> dict[Path, bytes]:
        """All files with their bytes, weights first."""
        backbone = _plain(method.backbone.state_dict())
        notes = self._described(step)
        text = self._instructions(notes).encode()
        match self.target:
            case "simsiam" | "solo":
                layout = LAYOUTS["SimSiam" if self.target == "simsiam" else "solo-learn"]
                buffer = io.BytesIO()
                named = {layout.prefix + name: tensor for name, tensor in backbone.items()}
                torch.save({"state_dict": named}, buffer)
                return {self.out: buffer.getvalue(), self._beside: text}
            case "hf":
                card = json.dumps(self._timm_config(), indent=1) + "\n"
                return {
                    self.out / "model.safetensors": _safetensors(backbone, notes),
                    self.out / "config.json": card.encode(),
                    self.out / "README.md": text,
                }
            case "safetensors":
                parts = {"backbone": method.backbone, "projector": method.projector}
                backbone = {
                    f"{part}.{name}": tensor
                    for part, module in parts.items()
                    for name, tensor in _plain(module.state_dict()).items()
                }
        return {self.out: _safetensors(backbone, notes), self._beside: text}

    @property
    def _beside(self) -> Path:
        return self.out.with_name(self.out.name + ".md")

    def _described(self, step: int) -> dict[str, Any]:
        """What weights cannot tell of themselves."""
        model, augment = self.config.model, self.config.augment
        return {
            "backbone": model.backbone, "stem": model.stem, "size": augment.size,
            "interpolation": augment.interpolation, "mean": augment.mean, "std": augment.std,
            "method": self.config.method, "predictor": self.config.predictor,
            "data": self.config.data.name, "step": step, "version": version(),
        }  # fmt: skip

    def _timm_config(self) -> dict[str, Any]:
        """config.json as timm's models on the hub have it."""
        augment = self.config.augment
        return {
            "architecture": self.config.model.backbone,
            "num_classes": 0,
            "model_args": {"in_chans": augment.channels},
            "pretrained_cfg": {
                "input_size": [augment.channels, augment.size, augment.size],
                "interpolation": augment.interpolation,
                "mean": augment.mean,
                "std": augment.std,
                "crop_pct": 224 / 256,
                "num_classes": 0,
                "first_conv": "conv1",
                "classifier": "fc",
            },
        }

    def _instructions(self, notes: dict[str, Any]) -> str:
        values = "\n".join(f"| {name} | {value} |" for name, value in notes.items())
        warnings = "".join(f"\nNote: {note}.\n" for note in self.notes)
        code = "\n".join(_CODE[self.target](self))
        return (
            f"# {self.config.model.backbone}, for {self.target}\n\n"
            "Backbone of a run of rdm-fast, without a classifier: it returns embeddings. Its views "
            "have the size, mean and standard deviation below.\n\n"
            f"```python\n{code}\n```\n{warnings}\n| | |\n|---|---|\n{values}\n"
        )


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _safetensors(tensors: dict[str, Tensor], notes: dict[str, Any]) -> bytes:
    return safetensors.torch.save(tensors, {"format": "pt", METADATA: json.dumps(notes)})


# ---- how each program loads it; run in the file's folder -------------------------------------


def _torchvision_model(file: _File) -> list[str]:
    return [
        f"model = torchvision.models.{file.config.model.backbone}(weights=None)",
        *file.preparation,
        "model.fc = torch.nn.Identity()  # embeddings, not classes",
    ]


def _torchvision(file: _File) -> list[str]:
    return [
        "import torch, torchvision",
        "from safetensors.torch import load_file",
        "",
        *_torchvision_model(file),
        f'model.load_state_dict(load_file("{file.out.name}"), strict=True)',
    ]


def _timm(file: _File) -> list[str]:
    channels = file.config.augment.channels
    grey = "" if channels == 3 else f", in_chans={channels}"
    return [
        "import timm, torch",
        "from safetensors.torch import load_file",
        "",
        f'model = timm.create_model("{file.config.model.backbone}", num_classes=0{grey})',
        *file.preparation,
        f'model.load_state_dict(load_file("{file.out.name}"), strict=True)',
    ]


def _prefixed(file: _File) -> list[str]:
    prefix = LAYOUTS["SimSiam" if file.target == "simsiam" else "solo-learn"].prefix
    return [
        "import torch, torchvision",
        "",
        f'state = torch.load("{file.out.name}", weights_only=True)["state_dict"]',
        *_torchvision_model(file),
        f'state = {{name.removeprefix("{prefix}"): tensor for name, tensor in state.items()}}',
        "model.load_state_dict(state, strict=True)",
    ]


def _ours(file: _File) -> list[str]:
    return [
        "from rdm_fast import load_backbone",
        "",
        f'model = load_backbone("{file.out.name}")',
    ]


def _hub(_file: _File) -> list[str]:
    return ["import timm", "", 'model = timm.create_model("local-dir:.", pretrained=True)']


_CODE: dict[Target, Callable[[_File], list[str]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "safetensors": _ours,
    "simsiam": _prefixed,
    "solo": _prefixed,
    "hf": _hub,
}
