"""Loading the backbone to evaluate: of a run's checkpoint, or of a file from any trainer."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from rdm_fast.config import Config
from rdm_fast.config.recipes import RECIPES
from rdm_fast.errors import InputMissing, UsageError
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.methods import Method, build_method
from rdm_fast.models.backbone import build_backbone
from rdm_fast.models.pretrained import load_strict, read_backbone
from rdm_fast.run import checkpoint
from rdm_fast.run.folder import read_config
from rdm_fast.runtime.distributed import print0

FOLDER = "evaluation"
"""Inside the run folder: cached embeddings, and a JSON file for each step and protocol."""


@dataclass(frozen=True, slots=True)
class LoadedBackbone:
    """A backbone with its data and views.

    Attributes:
        backbone: on the CPU, in evaluation mode.
        projector: of the same checkpoint, for the spectrum of its projections; None for files.
        config: of the run, or of the named recipe.
        key: identifies the weights: it changes with any of them.
        name: prefix of the files that an evaluation writes.
        folder: where those files go.
    """

    backbone: nn.Module
    projector: nn.Module | None
    config: Config
    key: str
    name: str
    folder: Path


def load_for_evaluation(command: EvaluateCommand) -> LoadedBackbone:
    """The backbone that a command names, loaded strictly.

    Raises:
        InputMissing: the path does not exist, or has no sound checkpoint.
        DataError: the weights cannot be used.
        UsageError: a flag for files is given with a run, or one that a file needs is missing.
    """
    path = Path(command.checkpoint)
    if path.is_file():
        return _load_file(path, command)
    for_files = {
        "--recipe": command.recipe, "--arch": command.arch != "auto",
        "--stem": command.stem != "auto", "--prefix": command.prefix,
    }  # fmt: skip
    if flag := next((flag for flag, value in for_files.items() if value), None):
        raise UsageError(f"{flag} is for a file of weights, and {path} has its own configuration")
    path = find_checkpoint(path)
    run = path.parent.parent
    config = _override(read_config(run), command)
    method, _ = load_method(path, config)
    folder = Path(command.out) if command.out else run / FOLDER
    key = (path / checkpoint.MANIFEST).read_text(encoding="utf-8")
    return LoadedBackbone(method.backbone, method.projector, config, key, path.name, folder)


def _override(config: Config, command: EvaluateCommand) -> Config:
    if command.precision != "auto":
        config = replace(config, precision=command.precision)
    if command.data_root is not None:
        config = replace(config, data=replace(config.data, root=command.data_root))
    if command.workers >= 0:
        config = replace(config, data=replace(config.data, workers=command.workers))
    return config


def _load_file(path: Path, command: EvaluateCommand) -> LoadedBackbone:
    if not command.recipe:
        raise UsageError(
            f"{path} has weights but no data set: name a recipe whose data set and views to use, "
            f"such as --recipe {next(reversed(RECIPES))}"
        )
    config = _override(RECIPES[command.recipe](), command)
    found = read_backbone(path, command.prefix)
    try:
        model = replace(
            config.model,
            backbone=found.backbone if command.arch == "auto" else command.arch,
            stem=found.stem if command.stem == "auto" else command.stem,
            width=found.width,
        )
    except ValueError as error:
        raise UsageError(f"--arch and --stem: {error}; {path} is a {found.backbone}") from error
    channels = config.augment.channels
    found.require(model, channels, stem_flag="--stem")
    backbone, _ = build_backbone(model, channels)
    print0(f"{found.load_into(backbone)}; {model.backbone}, stem {model.stem}")
    note = found.stem_note(model.stem, "--stem")
    if note and (command.stem == "auto" or not found.stem_source):
        print0(f"warning: {note}")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = Path(command.out) if command.out else path.with_name(f"{path.name}-{FOLDER}")
    return LoadedBackbone(
        backbone.eval(), None, replace(config, model=model),
        f"{digest} {model.backbone} {model.stem} {command.prefix}", path.stem, folder,
    )  # fmt: skip


def find_checkpoint(path: Path) -> Path:
    """The step folder of a run folder's newest sound checkpoint, or `path` if it is one.

    Raises:
        InputMissing: there is no checkpoint.
    """
    if not path.exists():
        raise InputMissing(f"{path} does not exist: give a run folder, or a step folder inside it")
    if (path / checkpoint.MANIFEST).exists() or path.name.startswith("step-"):
        return path
    if not (path / "config.yaml").exists():
        raise InputMissing(f"{path} is neither a run folder nor a checkpoint: give one of them")
    found = checkpoint.newest(path / "checkpoints", lambda text: print0(f"warning: {text}"))
    if found is None:
        raise InputMissing(f"the run in {path} has no sound checkpoint: train it first")
    return found


def load_method(path: Path, config: Config) -> tuple[Method, int]:
    """The method of a step folder, in evaluation mode on the CPU, and its step.

    Raises:
        DataError: the checkpoint is damaged, or of another architecture.
    """
    snapshot = checkpoint.load(path)
    method = build_method(config)
    what = f"checkpoint {path} (read as a {config.model.backbone} with a {config.method} head)"
    count = load_strict(method, snapshot.model, what)
    print0(f"{path}: {count} of {count} tensors matched, 0 missing, step {snapshot.step}")
    return method.eval(), snapshot.step
