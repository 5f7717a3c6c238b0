"""Writing a backbone under the names that another program expects, with instructions to load it.

Each file comes with a short text that has the lines of Python that load it, including the changes
that a plain ResNet needs if the run has a small stem. Weights are safetensors, or, if the program
reads only torch.save's format, such a file with nothing but tensors in it.
"""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from rdm_fast.config import Config
from rdm_fast.config.run import Branch
from rdm_fast.data.loaders.evaluation import shorter_side
from rdm_fast.errors import CannotCreate, UsageError
from rdm_fast.evaluation.loaded_backbone import load_method, step_and_branch
from rdm_fast.methods import Encoder
from rdm_fast.models.backbone import TORCHVISION
from rdm_fast.models.layouts import LAYOUTS
from rdm_fast.models.pretrained import backbone_note
from rdm_fast.models.timm_models import describe_timm
from rdm_fast.models.weight_files import METADATA
from rdm_fast.run.folder import read_config, refuse_links, version
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
"""Accepted suffixes of the file, the default first."""
PREFIXES: dict[Target, str] = {
    "simsiam": LAYOUTS["SimSiam"].prefix,
    "solo": LAYOUTS["solo-learn"].prefix,
}
"""Targets that take torch.save's format, and the prefix of their backbone's tensors."""
OF_TIMM = ("timm", "hf", "safetensors")
"""Targets that take any model of timm."""


def export_checkpoint(
    path: Path,
    target: Target,
    *,
    branch: Branch | Literal["auto"] = "auto",
    out: Path | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write the backbone of a checkpoint for another program, and instructions to load it.

    Args:
        path: a step folder inside a run folder.
        target: the program.
        branch: of a method with target weights.
        out: the file, for hf the folder; by default in the run folder's export/.
        overwrite: replace an earlier export.

    Returns:
        The lines of a summary: the files, and what their user must know.

    Raises:
        UsageError: the target has no such backbone, the run no such branch, or `out` the wrong
            suffix.
        CannotCreate: `out` exists, or cannot be written.
        InputMissing, DataError: the checkpoint cannot be used.
    """
    run = path.parent.parent
    config = read_config(run)
    branch = config.branch(branch)
    _require_target(target, config)
    suffix = SUFFIXES[target][0]
    if out is None:
        refuse_links(run)
        out = run / FOLDER / f"{step_and_branch(path, branch)}-{target}{suffix}"
    if suffix and out.suffix not in SUFFIXES[target]:
        raise UsageError(f"--out {out}: --to {target} writes a file *{suffix}")
    export = _Export(out, target, config, branch)
    method, step = load_method(path, config)
    files = export.contents(method.encoders[branch], step)
    _write(files, overwrite)
    model = config.model
    plain = "" if not export.preparation else f"; a plain {model.backbone} needs first:"
    layers = "" if model.timm_name else f" with stem {model.stem}"
    return [
        f"wrote {out}: {model.backbone}{layers}{plain}",
        *(f"    {line}" for line in export.preparation),
        *(f"note: {note}" for note in export.notes),
        f"how to load it: {next(name for name in files if name.suffix == '.md')}",
    ]


def _require_target(target: Target, config: Config) -> None:
    model = config.model
    if target != "safetensors" and model.backbone == "resnet8":
        raise UsageError(
            f"--to {target} has no resnet8, which only rdm-fast has: use --to safetensors and "
            "rdm_fast.load_backbone"
        )
    if model.timm_name:
        if target not in OF_TIMM and model.timm_name not in TORCHVISION:
            raise UsageError(
                f"--to {target} has torchvision's ResNets only, and this is a {model.backbone}: "
                f"use --to {' or '.join(OF_TIMM)}"
            )
    elif target == "hf" and model.stem != "imagenet":
        raise UsageError(
            f"--to hf: timm builds the model and has no {model.backbone} with stem {model.stem}: "
            "use --to timm, and the lines it prints"
        )


def _write(files: dict[Path, bytes], overwrite: bool) -> None:
    present = [path for path in files if path.exists()]
    if present and not overwrite:
        raise CannotCreate(f"{present[0]} exists: add --overwrite, or give another --out")
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.replace(path, content)
        except OSError as error:
            raise CannotCreate(
                f"--out: {path} cannot be written ({error.strerror}): give a writable folder"
            ) from error


@dataclass(frozen=True, slots=True)
class _Export:
    """The file `out` for `target`, from a branch of a run with `config`."""

    out: Path
    target: Target
    config: Config
    branch: Branch

    @property
    def _stem(self) -> str:
        """The first layers of a ResNet, timm's too."""
        return "imagenet" if self.config.model.timm_name else self.config.model.stem

    @property
    def _architecture(self) -> str:
        """The model's name in torchvision or timm."""
        return self.config.model.timm_name or self.config.model.backbone

    @property
    def preparation(self) -> list[str]:
        """Changes to a plain ResNet before it can load the weights."""
        stem, channels = self._stem, self.config.augment.channels
        of_timm = self.target == "timm" and self.config.model.timm_name
        if (
            self.target in ("safetensors", "hf")
            or of_timm
            or (stem == "imagenet" and channels == 3)
        ):
            return []
        if stem == "imagenet":
            return [
                f"model.conv1 = torch.nn.Conv2d({channels}, 64, 7, stride=2, padding=3, bias=False)"
            ]
        padding = 2 if stem == "cifar_pad2" else 1
        lines = [
            f"model.conv1 = torch.nn.Conv2d({channels}, 64, 3, padding={padding}, bias=False)",
            "model.maxpool = torch.nn.Identity()",
        ]
        if stem == "cifar_no_relu":
            relu = "act1" if self.target == "timm" else "relu"
            lines.append(f"model.{relu} = torch.nn.Identity()")
        return lines

    @property
    def notes(self) -> list[str]:
        """What may surprise a user of the program."""
        stem = self._stem
        if self.target == "simsiam" and stem != "imagenet":
            return ["main_lincls.py builds the 7x7 stem; change its model as above"]
        if self.target == "solo" and stem not in ("imagenet", "cifar_pad2"):
            return [
                "solo-learn's small stem pads by 2 and has a ReLU: the file loads there, but "
                "embeds differently; change its model as above"
            ]
        return []

    def contents(self, encoder: Encoder, step: int) -> dict[Path, bytes]:
        """All files with their bytes, weights first."""
        backbone = _plain(encoder.backbone.state_dict())
        metadata = self._metadata(step)
        text = self._instructions(metadata).encode()
        beside = self.out.with_name(self.out.name + ".md")
        if self.target == "hf":
            card = json.dumps(self._timm_config(), indent=1) + "\n"
            return {
                self.out / "model.safetensors": _safetensors(backbone, metadata),
                self.out / "config.json": card.encode(),
                self.out / "README.md": text,
            }
        if self.target in PREFIXES:
            buffer = io.BytesIO()
            prefix = PREFIXES[self.target]
            state = {prefix + n: t for n, t in backbone.items()}
            torch.save({"state_dict": state, METADATA: json.dumps(metadata)}, buffer)
            return {self.out: buffer.getvalue(), beside: text}
        if self.target == "safetensors":
            projector = _plain(encoder.projector.state_dict())
            backbone = {f"backbone.{n}": t for n, t in backbone.items()} | {
                f"projector.{n}": t for n, t in projector.items()
            }
        return {self.out: _safetensors(backbone, metadata), beside: text}

    def _metadata(self, step: int) -> dict[str, Any]:
        """Facts that weights do not contain."""
        return {
            **backbone_note(self.config), **self._preprocessing(),
            "method": self.config.method, "predictor": self.config.predictor,
            "branch": self.branch,
            "data": self.config.data.name, "step": step, "version": version(),
        }  # fmt: skip

    def _preprocessing(self) -> dict[str, Any]:
        """How evaluation shows images, in the words of timm's `pretrained_cfg`."""
        augment, size = self.config.augment, self.config.augment.size
        crop_pct = size / (short := shorter_side(size))
        if math.floor(size / crop_pct) != short:  # as timm computes it
            crop_pct = math.nextafter(crop_pct, 0)
        return {
            "input_size": (augment.channels, size, size),
            "interpolation": augment.interpolation,
            "mean": augment.mean,
            "std": augment.std,
            "crop_pct": crop_pct,
        }

    def _timm_config(self) -> dict[str, Any]:
        """config.json in the format of timm's models on the hub."""
        model_args, ends = self._timm_arguments()
        return {
            "architecture": self._architecture,
            "num_classes": 0,
            "model_args": model_args,
            "pretrained_cfg": {**self._preprocessing(), "num_classes": 0, **ends},
        }

    def _timm_arguments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What timm builds the model with, and the names of its first and last layers."""
        model, augment = self.config.model, self.config.augment
        if model.timm_name:
            return describe_timm(model, augment.channels, augment.size)
        return {"in_chans": augment.channels}, {"first_conv": "conv1", "classifier": "fc"}

    def _instructions(self, metadata: dict[str, Any]) -> str:
        code = "\n".join(self._code())
        notes = "".join(f"\nNote: {note}.\n" for note in self.notes)
        rows = "\n".join(f"| {name} | {value} |" for name, value in metadata.items())
        return (
            f"# {self._architecture}, for {self.target}\n\n"
            "Backbone of a run of rdm-fast, without a classifier: it returns embeddings. Give it "
            "images of the size, mean and standard deviation below.\n\n"
            f"```python\n{code}\n```\n{notes}\n| | |\n|---|---|\n{rows}\n"
        )

    def _code(self) -> list[str]:
        """Python that loads the file as `model`, run in the file's folder."""
        name, arch = self.out.name, self._architecture
        load_file = "from safetensors.torch import load_file"
        load = f'model.load_state_dict(load_file("{name}"), strict=True)'
        torchvision = [
            f"model = torchvision.models.{arch}(weights=None)",
            *self.preparation,
            "model.fc = torch.nn.Identity()  # embeddings, not classes",
        ]
        match self.target:
            case "torchvision":
                return ["import torch, torchvision", load_file, "", *torchvision, load]
            case "timm":
                arguments = {
                    "num_classes": 0,
                    **self._timm_arguments()[0],
                    "pretrained_cfg_overlay": self._preprocessing(),
                }
                given = ", ".join(f"{key}={value}" for key, value in arguments.items())
                create = f'model = timm.create_model("{arch}", {given})'
                return ["import timm, torch", load_file, "", create, *self.preparation, load]
            case "safetensors":
                return [
                    "from rdm_fast import load_backbone",
                    "",
                    f'model = load_backbone("{name}")',
                ]
            case "hf":
                create = 'model = timm.create_model("local-dir:.", pretrained=True)'
                return ["import timm", "", create]
        prefix = PREFIXES[self.target]
        return [
            "import torch, torchvision",
            "",
            f'state = torch.load("{name}", weights_only=True)["state_dict"]',
            *torchvision,
            f'state = {{name.removeprefix("{prefix}"): tensor for name, tensor in state.items()}}',
            "model.load_state_dict(state, strict=True)",
        ]


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _safetensors(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> bytes:
    return safetensors.torch.save(tensors, {"format": "pt", METADATA: json.dumps(metadata)})
