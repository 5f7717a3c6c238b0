"""What every command may be asked: a recipe name and single fields changed, in most of them.

All is checked before torch is loaded; every mistake is told in one `error:` line with a way out.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from rdm_fast.cli.flags import ALIASES, nearest, normalize, parse
from rdm_fast.config import Config
from rdm_fast.config.parallel import check_nproc
from rdm_fast.config.recipes import DEFAULT, RECIPES, recipe
from rdm_fast.errors import UsageError
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.evaluation.protocols import PROTOCOLS
from rdm_fast.tools.doctor.options import DoctorCommand
from rdm_fast.tools.export.options import ExportCommand
from rdm_fast.tools.export.targets import TARGETS
from rdm_fast.tools.report.options import ReportCommand
from rdm_fast.tools.sweep.grid import GRID, VARIED
from rdm_fast.tools.sweep.options import SweepCommand

Switch = tyro.conf.FlagCreatePairsOff[bool]


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


def without_nproc(words: Sequence[str]) -> list[str]:
    """The words of a command but for --nproc and its value: what each rank is asked to do."""
    kept: list[str] = []
    for i, word in enumerate(words):
        is_value = i > 0 and words[i - 1] == "--nproc"
        if not is_value and word.partition("=")[0] != "--nproc":
            kept.append(word)
    return kept


def _split(argv: Sequence[str], command: type) -> tuple[list[str], list[str]]:
    """The recipe's name, if the first word is one, and the normalized rest.

    Raises:
        UsageError: an unknown recipe or flag.
    """
    words = normalize(argv, command)
    named = [words.pop(0)] if words and not words[0].startswith("-") else []
    for name in named:
        if name not in RECIPES:
            raise UsageError(f"unknown recipe {name}: {nearest(name, list(RECIPES))}")
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
    command = parse(
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
    return parse(
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
    words = normalize(argv, EvaluateCommand)
    return parse(
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
    words = normalize(argv, ExportCommand)
    targets = "\n".join(f"  {name}: {what}" for name, what in TARGETS.items())
    return parse(
        ExportCommand,
        words,
        prog,
        description="Write the backbone of a checkpoint for other programs.\n\nTargets:\n"
        + targets,
    )


def parse_report(argv: Sequence[str], prog: str = "rdm report") -> ReportCommand:
    """Which runs to show, and how.

    Raises:
        UsageError: as for `parse_train`.
    """
    return parse(
        ReportCommand,
        normalize(argv, ReportCommand),
        prog,
        description="One HTML page that shows runs: curves, spectra, filter response, embeddings.",
    )


def parse_sweep(argv: Sequence[str], prog: str = "rdm sweep") -> SweepCommand:
    """The recipe whose filter is varied, and how.

    Raises:
        UsageError: as for `parse_train`, or a flag sets what the sweep varies.
    """
    named, words = _split(argv, SweepCommand)
    name = (named or [DEFAULT])[0]
    if fixed := [flag for flag in VARIED if flag in {word.partition("=")[0] for word in words}]:
        raise UsageError(
            f"a sweep varies {', '.join(fixed)}: name filters instead, as in "
            "--filter online_s1 target_s-0.5 control"
        )
    try:
        default = SweepCommand(config=replace(recipe(name), out=f"runs/sweep_{name}"))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return parse(
        SweepCommand,
        words,
        f"{prog} [RECIPE]",
        default=default,
        description=f"Run RECIPE ({name} here) with each of several filters, --out being the "
        f"folder of all runs.\n\nThe paper's filters: {', '.join(GRID)}",
    )
