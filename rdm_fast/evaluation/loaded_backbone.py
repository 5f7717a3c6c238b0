"""What is evaluated: the backbone of a run's checkpoint, or of a file of any trainer."""

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
"""Inside the run folder: cached embeddings, and one JSON file of results a protocol and step."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A backbone, and the data and views it is evaluated with.

    Attributes:
        backbone: on the CPU, in evaluation mode.
        projector: of the same checkpoint, for the spectrum of its projections; files have none.
        config: of the run, or of the recipe that was named.
        key: what its weights are: changes with any of them.
        name: begins the names of the files that are written of it.
        folder: where those go.
    """

    backbone: nn.Module
    projector: nn.Module | None
    config: Config
    key: str
    name: str
    folder: Path


def find_subject(command: EvaluateCommand) -> Subject:
    """What the command names, loaded strictly.

    Raises:
        InputMissing: there is nothing, or no sound checkpoint.
        DataError: it cannot be used.
        UsageError: flags that are for files alone, or one of those missing.
    """
    path = Path(command.checkpoint)
    if path.is_file():
        return _of_file(path, command)
    given = {
        "--recipe": command.recipe, "--arch": command.arch != "auto",
        "--stem": command.stem != "auto", "--prefix": command.prefix,
    }  # fmt: skip
    if any(given.values()):
        flag = next(flag for flag, value in given.items() if value)
        raise UsageError(f"{flag} is for a file of weights: {path} has a configuration of its own")
    path = find_checkpoint(path)
    run = path.parent.parent
    config = _changed(read_config(run), command)
    method = load_method(path, config)
    folder = Path(command.out) if command.out else run / FOLDER
    key = (path / checkpoint.MANIFEST).read_text(encoding="utf-8")
    return Subject(method.backbone, method.projector, config, key, path.name, folder)


def _changed(config: Config, command: EvaluateCommand) -> Config:
    if command.precision != "auto":
        config = replace(config, precision=command.precision)
    if command.data_root is not None:
        config = replace(config, data=replace(config.data, root=command.data_root))
    return config


def _of_file(path: Path, command: EvaluateCommand) -> Subject:
    if not command.recipe:
        raise UsageError(
            f"{path} is a file of weights, which says nothing of images: name a recipe whose data "
            f"set and views to use, such as --recipe {next(reversed(RECIPES))}"
        )
    config = _changed(RECIPES[command.recipe](), command)
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
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = Path(command.out) if command.out else path.with_name(f"{path.name}-{FOLDER}")
    return Subject(
        backbone.eval(), None, replace(config, model=model),
        f"{digest} {model.backbone} {model.stem} {command.prefix}", path.stem, folder,
    )  # fmt: skip


def find_checkpoint(path: Path) -> Path:
    """The step folder that a run folder's newest sound checkpoint is, or `path` itself.

    Raises:
        InputMissing: there is no checkpoint there.
    """
    if not path.exists():
        raise InputMissing(f"{path} does not exist: give a run folder, or a step folder inside it")
    if (path / "manifest.json").exists() or path.name.startswith("step-"):
        return path
    if not (path / "config.yaml").exists():
        raise InputMissing(f"{path} is neither a run folder nor a checkpoint of one")
    found = checkpoint.newest(path / "checkpoints", lambda text: print0(f"warning: {text}"))
    if found is None:
        raise InputMissing(f"the run in {path} has no sound checkpoint: train it first")
    return found


def load_method(path: Path, config: Config) -> Method:
    """The method of a step folder, in evaluation mode on the CPU; says how many tensors matched.

    Raises:
        DataError: the checkpoint is damaged, or of another architecture.
    """
    snapshot = checkpoint.load(path)
    method = build_method(config)
    what = f"checkpoint {path} (read as a {config.model.backbone} with a {config.method} head)"
    count = load_strict(method, snapshot.model, what)
    print0(f"{path}: {count} of {count} tensors matched, 0 missing, step {snapshot.step}")
    return method.eval()
