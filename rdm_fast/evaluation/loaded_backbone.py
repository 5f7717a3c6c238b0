"""Loading the backbone to evaluate: of a run's checkpoint, or of a file from any trainer."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from rdm_fast.config import Config
from rdm_fast.config.recipes import RECIPES
from rdm_fast.config.run import Branch
from rdm_fast.errors import InputMissing, UsageError
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.methods import Method, build_method
from rdm_fast.models.backbone import build_backbone
from rdm_fast.models.batchnorm import copy_statistics, norms_of
from rdm_fast.models.pretrained import read_backbone
from rdm_fast.models.weight_files import load_strict
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
        branch: of the run; None for files.
    """

    backbone: nn.Module
    projector: nn.Module | None
    config: Config
    key: str
    name: str
    folder: Path
    branch: Branch | None = None

    @property
    def whole(self) -> nn.Sequential:
        """From images to projections; to embeddings for files."""
        return nn.Sequential(self.backbone, *([self.projector] if self.projector else []))


def load_for_evaluation(command: EvaluateCommand) -> LoadedBackbone:
    """The backbone that a command names, loaded strictly.

    Raises:
        InputMissing: the path does not exist, or has no sound checkpoint.
        DataError: the weights cannot be used.
        UsageError: a flag for files is given with a run, one that a file needs is missing, or the
            run has no such branch or batch norms.
    """
    path = Path(command.checkpoint)
    loaded = _load_file(path, command) if path.is_file() else _load_run(path, command)
    if command.bn != "own" and not norms_of(loaded.whole):
        raise UsageError(
            f"--bn {command.bn}: {path} has no batch norm with running statistics: leave out --bn"
        )
    return loaded


def _load_run(path: Path, command: EvaluateCommand) -> LoadedBackbone:
    for_files = {
        "--recipe": command.recipe, "--arch": command.arch != "auto",
        "--stem": command.stem != "auto", "--patch-size": command.patch_size,
        "--prefix": command.prefix,
    }  # fmt: skip
    if flag := next((flag for flag, value in for_files.items() if value), None):
        raise UsageError(f"{flag} is for a file of weights, and {path} has its own configuration")
    path = find_checkpoint(path)
    run = path.parent.parent
    config = _override(read_config(run), command)
    branch = config.branch(command.branch)
    if command.bn == "online" and branch == "online":
        raise UsageError("--bn online is for --branch target: leave it out for the online branch")
    encoders = load_method(path, config)[0].encoders
    encoder = encoders[branch]
    if command.bn == "online":
        for ours, theirs in zip(encoder, encoders["online"], strict=True):
            copy_statistics(theirs, ours)
    folder = Path(command.out) if command.out else run / FOLDER
    key = (path / checkpoint.MANIFEST).read_text(encoding="utf-8")
    name = _with_bn(step_and_branch(path, branch), command)
    return LoadedBackbone(*encoder, config, key, name, folder, branch)


def step_and_branch(path: Path, branch: Branch) -> str:
    """What names of files made of a step folder begin with."""
    return f"{path.name}-target" if branch == "target" else path.name


def _with_bn(name: str, command: EvaluateCommand) -> str:
    return name if command.bn == "own" else f"{name}-bn-{command.bn}"


def _override(config: Config, command: EvaluateCommand) -> Config:
    if command.precision != "auto":
        config = replace(config, precision=command.precision)
    if command.data_root is not None:
        config = replace(config, data=replace(config.data, root=command.data_root))
    if command.workers >= 0:
        config = replace(config, data=replace(config.data, workers=command.workers))
    return config


def _load_file(path: Path, command: EvaluateCommand) -> LoadedBackbone:
    for flag, given in (("--branch", command.branch), ("--bn", command.bn)):
        if given in ("online", "target"):
            raise UsageError(f"{flag} {given} is for a run, and {path} is a file of weights")
    if not command.recipe:
        raise UsageError(
            f"{path} has weights but no data set: name a recipe whose data set and views to use, "
            f"such as --recipe {next(reversed(RECIPES))}"
        )
    config = _override(RECIPES[command.recipe](), command)
    arch = "" if command.arch == "auto" else command.arch
    found = read_backbone(path, command.prefix, arch)
    changes = {
        "backbone": arch, "patch_size": command.patch_size,
        "stem": "" if command.stem == "auto" else command.stem,
    }  # fmt: skip
    settings = found.settings | {name: value for name, value in changes.items() if value}
    try:
        model = replace(config.model, **settings)
    except ValueError as error:
        raise UsageError(
            f"--arch, --stem and --patch-size: {error}; {path} is a {found.backbone}"
        ) from error
    images = config.augment.channels, config.augment.sizes
    found.require(model, *images, stem_flag="--stem")
    backbone, _ = build_backbone(model, *images)
    stem = "" if model.timm_name else f", stem {model.stem}"
    print0(f"{found.load_into(backbone)}; {model.backbone}{stem}")
    note = found.stem_note(model.stem, "--stem")
    if note and (command.stem == "auto" or not found.stem_source):
        print0(f"warning: {note}")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = Path(command.out) if command.out else path.with_name(f"{path.name}-{FOLDER}")
    return LoadedBackbone(
        backbone.eval(), None, replace(config, model=model),
        f"{digest} {model.backbone} {model.stem} {model.patch_size} {command.prefix}",
        _with_bn(path.stem, command), folder,
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
