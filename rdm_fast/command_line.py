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
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, TypeVar

import tyro

from rdm_fast.config import Config
from rdm_fast.errors import UsageError
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.evaluation.protocols import PROTOCOLS
from rdm_fast.export.targets import TARGETS, Target
from rdm_fast.parallel_config import check_nproc
from rdm_fast.recipes import DEFAULT, RECIPES, recipe

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
    "--init": "--model.init",
}
"""The paper's own flags, and names that SimSiam, MoCo and torchvision share. Batch is global.

A command knows those of its own flags only."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """What `train` was asked to do."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    nproc: str = "1"
    """Ranks to start on this machine: a number, gpu (one a GPU), or auto (gpu, or 1 without)."""
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

    def __post_init__(self) -> None:
        check_nproc(self.nproc)


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """What `rdm export` was asked to do."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder (its newest checkpoint), or one step folder inside its checkpoints."""
    to: Target
    """What shall load the weights."""
    out: str | None = None
    """File to write (for hf a folder); by default export/STEP-TARGET in the run folder."""
    overwrite: Switch = False
    """Replace what an earlier export wrote there."""
    debug: Switch = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """What `doctor` was asked to measure."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    json: str | None = None
    """Also write what was found and measured to this file, as JSON."""
    batches: int = 8
    """Batches measured of each stage, fewer where they take over 15 seconds."""
    debug: Switch = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"batches={self.batches}: give 1 or more")


def without_nproc(words: Sequence[str]) -> list[str]:
    """The words of a command but for --nproc and its value: what each rank is asked to do."""
    kept: list[str] = []
    for i, word in enumerate(words):
        is_value = i > 0 and words[i - 1] == "--nproc"
        if not is_value and word.partition("=")[0] != "--nproc":
            kept.append(word)
    return kept


def _nearest(word: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {found[0]}? (--help lists all)" if found else "--help lists all"


def flags(command: type, prefix: str = "--") -> list[str]:
    """Every flag of a command, as it is written on a command line."""
    names: list[str] = []
    for field in fields(command):
        if field.type is tyro.conf.Positional[str] or not field.metadata.get("flag", True):
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


def _split(argv: Sequence[str], command: type) -> tuple[list[str], list[str]]:
    """The recipe's name, if the first word is one, and the normalised rest.

    Raises:
        UsageError: an unknown recipe or flag.
    """
    words = _normalise(argv, command)
    named = [words.pop(0)] if words and not words[0].startswith("-") else []
    for name in named:
        if name not in RECIPES:
            raise UsageError(f"unknown recipe {name}: {_nearest(name, list(RECIPES))}")
    return named, words


def _lists() -> str:
    """Recipes and short names, for the end of a help text."""
    recipes = "\n".join(f"  {key}: {(make.__doc__ or '')}" for key, make in RECIPES.items())
    short = "\n".join(f"  {alias}: {flag}" for alias, flag in ALIASES.items())
    return f"Recipes:\n{recipes}\n\nShort names:\n{short}"


def parse_train(argv: Sequence[str], prog: str = "train.py") -> TrainCommand:
    """The recipe that argv names (or the default one), with the fields that argv changes.

    Raises:
        UsageError: an unknown recipe or flag, a bad value, or an impossible combination.
    """
    named, words = _split(argv, TrainCommand)
    name = (named or [DEFAULT])[0]
    command = _parse(
        TrainCommand,
        words,
        f"{prog} [RECIPE]",
        default=TrainCommand(config=recipe(name)),
        description=f"Train RECIPE ({name} here), changing single fields.\n\n{_lists()}",
    )
    if command.resume is None:
        check_ranks(command.config, command.nproc)
        return command
    alone = {"--resume", "--nproc", "--print-config", "--debug"}
    given = {word.partition("=")[0] for word in words if word.startswith("--")} - alone
    if given or named:
        raise UsageError(
            "--resume takes the configuration from the run folder and goes on with it: leave out "
            f"{', '.join([*named, *sorted(given)])}, or give recipe and --out instead of --resume"
        )
    return command


def parse_doctor(argv: Sequence[str], prog: str = "rdm doctor") -> DoctorCommand:
    """The run to measure: recipe and flags as for training.

    Raises:
        UsageError: as for `parse_train`; or several ranks, for one process measures alone.
    """
    named, words = _split(argv, DoctorCommand)
    name = (named or [DEFAULT])[0]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"{prog} measures one process: start it without torchrun, with --optim.global-batch "
            "the share of one rank"
        )
    return _parse(
        DoctorCommand,
        words,
        f"{prog} [RECIPE]",
        default=DoctorCommand(config=recipe(name)),
        description="Say what this machine has and lacks, then measure the parts of a step of "
        f"RECIPE ({name} here) and name the bottleneck.\n\n{_lists()}",
    )


def check_ranks(config: Config, nproc: str) -> None:
    """Make sure that the global batch divides over the ranks, started or to be started.

    Args:
        config: of the run.
        nproc: as in --nproc; of gpu and auto nothing is known without torch.

    Raises:
        UsageError: it does not.
    """
    if nproc in ("gpu", "auto"):
        return
    try:
        config.optim.local_batch(int(os.environ.get("WORLD_SIZE", nproc)))
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


def parse_export(argv: Sequence[str], prog: str = "rdm export") -> ExportCommand:
    """What to export, and for whom.

    Raises:
        UsageError: as for `parse_train`.
    """
    words = _normalise(argv, ExportCommand)
    targets = "\n".join(f"  {name}: {what}" for name, what in TARGETS.items())
    return _parse(
        ExportCommand,
        words,
        prog,
        description="Write the backbone of a checkpoint for other programs.\n\nTargets:\n"
        + targets,
    )
