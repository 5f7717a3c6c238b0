"""Command lines: a recipe name and single fields changed, checked before torch is loaded.

tyro turns the configuration's dataclasses into flags. Around it: short names that other trainers
use, a recipe as the first word, and every mistake told in one `error:` line with a way out.
"""

import contextlib
import difflib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, TypeVar

import tyro

from rdm_fast.config import Config
from rdm_fast.errors import UsageError
from rdm_fast.evaluation.protocols import PROTOCOLS
from rdm_fast.recipes import DEFAULT, RECIPES, recipe
from rdm_fast.report.options import ReportCommand
from rdm_fast.sweep.grid import GRID, VARIED
from rdm_fast.sweep.options import SweepCommand

Switch = tyro.conf.FlagCreatePairsOff[bool]
Command = TypeVar("Command")

ALIASES = {
    "--pred-type": "--filter.kind",
    "--pred-location": "--filter.location",
    "--sigma": "--filter.sigma",
    "--arch": "--model.backbone",
    "--epochs": "--optim.epochs",
    "--batch-size": "--optim.global-batch",
    "--lr": "--optim.base-lr",
    "--wd": "--optim.weight-decay",
    "--momentum": "--optim.momentum",
    "--workers": "--data.workers",
    "--guard": "--guard.mode",
}
"""The paper's own flags, and names that SimSiam, MoCo and torchvision share. Batch is global.

A command knows those of its own flags only."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """What `train` was asked to do."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    resume: str | None = None
    """Continue the run in this folder, with the configuration it was started with."""
    overwrite: Switch = False
    """Start anew in a run folder that already holds a run of ours, deleting that run."""
    allow_change: tuple[str, ...] = ()
    """Names of schedule fields that may differ from the run being resumed, as optim.epochs."""
    print_config: Switch = False
    """Print the whole configuration as YAML and stop."""
    debug: Switch = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """What `eval_linear` was asked to do."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder (its newest checkpoint), or one step folder inside its checkpoints."""
    protocol: str = "auto"
    """Linear probe on frozen features, by name; auto chooses by data set."""
    data_root: str | None = None
    """Where the data set is now, if not where the run found it."""
    batch: int = 256
    """Images in one forward pass of the backbone, on each rank."""
    seed: int = 0
    """Seed of the probe."""
    device: str = "auto"
    """auto, cpu or cuda."""
    debug: Switch = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if self.protocol != "auto" and self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self.protocol} is unknown: use auto, {_or(PROTOCOLS)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device} is unknown: use auto, cpu or cuda")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: give 1 or more images")


def _or(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"


def _nearest(word: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {found[0]}? (--help lists all)" if found else "--help lists all"


def flags(command: type, prefix: str = "--") -> list[str]:
    """Every flag of a command, as it is written on a command line."""
    names: list[str] = []
    for field in fields(command):
        positional = (tyro.conf.Positional[str], tyro.conf.Positional[tuple[str, ...]])
        if field.type in positional or not field.metadata.get("flag", True):
            continue
        kind = Config if field.name == "config" else field.type
        name = prefix + field.name.replace("_", "-")
        if is_dataclass(kind) and isinstance(kind, type):
            names += flags(kind, prefix if kind is Config else name + ".")
        else:
            names.append(name)
            if kind is bool:
                head, _, tail = name.rpartition(".")
                names.append(f"{head}.no-{tail}" if head else f"--no-{name[2:]}")
    return names


def _normalise(argv: Sequence[str], command: type) -> list[str]:
    """Aliases replaced, `_` and `-` alike, unknown flags told with the nearest name.

    Raises:
        UsageError: a flag that no field has.
    """
    own = flags(command)
    aliases = {alias: flag for alias, flag in ALIASES.items() if flag in own}
    known = [*own, *aliases, "--help"]
    words: list[str] = []
    for word in argv:
        if re.match(r"--?[A-Za-z]", word):
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-")
            if flag not in (*known, "-h"):
                raise UsageError(f"unknown flag {flag}: {_nearest(flag, known)}")
            word = aliases.get(flag, flag) + equals + value
        words.append(word)
    return words


PLAIN_WORDS = {
    r"^Error parsing config\.augment\.(view[12]): augment\.view\.": r"augment.\1.",
    r"^Error parsing \w[\w.]*: ": "",
    r"^Error parsing (\S+): invalid literal for int\(\) .*: ": r"\1 takes a whole number, not ",
    r"^Error parsing (\S+): could not convert string to float: ": r"\1 takes a number, not ",
    r"^Error parsing (\S+): Could not parse arguments (\[.*\]) .*": r"\1 takes numbers, not \2",
    r"^Missing value for argument '(\S+)'\. Expected 1 values\.": r"\1 needs a value",
    r"^Missing value for argument '(\S+)'\. Expected (\d+) values\.": r"\1 needs \2 values",
    r"^Missing from .*": "name a run folder, or a step folder inside its checkpoints",
    r"^invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*)\)\.": (
        r"\2 cannot be \1: use one of \3"
    ),
    r"^Unrecognized options: ": "a value too many: ",
}


def _message(printed: str) -> str:
    """The sentence inside tyro's box, which has a title above it and a rule below."""
    lines = [line.strip("│╭╮╰╯─- ") for line in printed.splitlines()]
    sentences = [line for line in lines if line][1:]
    message = sentences[0] if sentences else printed.strip()
    for pattern, replacement in PLAIN_WORDS.items():
        message = re.sub(pattern, replacement, message)
    return message


def _parse(command: type[Command], argv: list[str], prog: str, **options: Any) -> Command:
    """tyro's result; its boxed errors become one UsageError.

    Raises:
        UsageError: a value of the wrong type, or a configuration that cannot be meant.
    """
    if "-h" in argv or "--help" in argv:
        hidden = (tyro.conf.SuppressFixed,)  # what only Python code can give
        return tyro.cli(command, args=["--help"], prog=prog, config=hidden, **options)
    printed = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"  # so that a message is one line
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(command, args=argv, prog=prog, **options)
    except SystemExit:
        raise UsageError(_message(printed.getvalue())) from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def _take_recipe(words: list[str]) -> tuple[list[str], str]:
    """The recipe's name taken off the front, if there is one, and the name to use.

    Raises:
        UsageError: there is no such recipe.
    """
    named = [words.pop(0)] if words and not words[0].startswith("-") else []
    for name in named or [DEFAULT]:
        if name not in RECIPES:
            raise UsageError(f"unknown recipe {name}: {_nearest(name, list(RECIPES))}")
    return named, name


def parse_train(argv: Sequence[str], prog: str = "train.py") -> TrainCommand:
    """The recipe that argv names (or the default one), with the fields that argv changes.

    Raises:
        UsageError: an unknown recipe or flag, a bad value, or an impossible combination.
    """
    words = _normalise(argv, TrainCommand)
    named, name = _take_recipe(words)
    recipes = "\n".join(f"  {key}: {(make.__doc__ or '')}" for key, make in RECIPES.items())
    short = "\n".join(f"  {alias}: {flag}" for alias, flag in ALIASES.items())
    command = _parse(
        TrainCommand,
        words,
        f"{prog} [RECIPE]",
        default=TrainCommand(config=recipe(name)),
        description=f"Train RECIPE ({name} here), changing single fields.\n\nRecipes:\n{recipes}"
        f"\n\nShort names:\n{short}",
    )
    if command.resume is None:
        check_ranks(command.config)
        return command
    alone = {"--resume", "--print-config", "--debug"}
    given = {word.partition("=")[0] for word in words if word.startswith("--")} - alone
    if given or named:
        raise UsageError(
            "--resume takes the configuration from the run folder and goes on with it: leave out "
            f"{', '.join([*named, *sorted(given)])}, or give recipe and --out instead of --resume"
        )
    return command


def check_ranks(config: Config) -> None:
    """Make sure that the global batch divides over the ranks that torchrun started.

    Raises:
        UsageError: it does not.
    """
    try:
        config.optim.local_batch(int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        raise UsageError(str(error)) from None


def parse_evaluate(argv: Sequence[str], prog: str = "eval_linear.py") -> EvaluateCommand:
    """What to evaluate, and how.

    Raises:
        UsageError: as for `parse_train`.
    """
    words = _normalise(argv, EvaluateCommand)
    return _parse(
        EvaluateCommand,
        words,
        prog,
        description="Linear probe and kNN on the frozen features of a checkpoint.\n\nProtocols: "
        + ", ".join(PROTOCOLS),
    )


def parse_report(argv: Sequence[str], prog: str = "rdm report") -> ReportCommand:
    """Which runs to show, and how.

    Raises:
        UsageError: as for `parse_train`.
    """
    return _parse(
        ReportCommand,
        _normalise(argv, ReportCommand),
        prog,
        description="One HTML page that shows runs: curves, spectra, filter response, embeddings.",
    )


def parse_sweep(argv: Sequence[str], prog: str = "rdm sweep") -> SweepCommand:
    """The recipe whose filter is varied, and how.

    Raises:
        UsageError: as for `parse_train`, or a flag sets what the sweep varies.
    """
    words = _normalise(argv, SweepCommand)
    _, name = _take_recipe(words)
    if fixed := [flag for flag in VARIED if flag in {word.partition("=")[0] for word in words}]:
        raise UsageError(
            f"a sweep varies {', '.join(fixed)}: name filters instead, as in "
            "--filter online_s1 target_s-0.5 control"
        )
    try:
        default = SweepCommand(config=replace(recipe(name), out=f"runs/sweep_{name}"))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return _parse(
        SweepCommand,
        words,
        f"{prog} [RECIPE]",
        default=default,
        description=f"Run RECIPE ({name} here) with each of several filters, --out being the "
        f"folder of all runs.\n\nThe paper's filters: {', '.join(GRID)}",
    )
