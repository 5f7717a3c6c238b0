"""The commands behind `rdm`, train.py and eval_linear.py.

Every user error ends in one `error:` line and an exit code for its kind (rdm_fast.errors). torch is
imported only after the command line has been checked.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import yaml

from rdm_fast.cli.options import PreviewCommand, TrainCommand, check_resume_is_alone
from rdm_fast.cli.parse import Command, for_ranks
from rdm_fast.config.checks import did_you_mean
from rdm_fast.config.run import NEEDS_LESS
from rdm_fast.errors import Unavailable, UsageError, UserError, explained
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.evaluation.protocols import PROTOCOLS
from rdm_fast.runtime import signals
from rdm_fast.runtime.launcher import check_ranks, launched, speaks
from rdm_fast.runtime.printing import guard_streams, print_error, print_line, traceback_of
from rdm_fast.tools.doctor.options import DoctorCommand
from rdm_fast.tools.export.options import ExportCommand
from rdm_fast.tools.export.targets import TARGETS
from rdm_fast.tools.report.options import ReportCommand
from rdm_fast.tools.sweep.grid import GRID
from rdm_fast.tools.sweep.methods import METHODS
from rdm_fast.tools.sweep.options import SweepCommand, check_varied_is_free

LOWER = {"eval": "--batch", "report": "--images", "export": ""}
"""Flags that lower how much memory a command needs, where they are not those of a training."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `rdm COMMAND ...`; the exit code says how it ended."""
    args = _words(argv)
    if not args or args[0] in ("-h", "--help"):
        print_line(f"usage: rdm {{{','.join(COMMANDS)}}} ...; rdm COMMAND --help lists its flags")
        raise SystemExit(0 if args else 2)
    if args[0] not in COMMANDS:
        fix = did_you_mean(args[0], COMMANDS, f"use one of {', '.join(COMMANDS)}")
        _exit_with(UsageError(f"unknown command {args[0]}: {fix}"))
    _run(args[0], args[1:], f"rdm {args[0]}")


def train(argv: Sequence[str] | None = None, prog: str = "train.py") -> NoReturn:
    """`rdm train` as a script, for torchrun."""
    _run("train", _words(argv), prog)


def evaluate(argv: Sequence[str] | None = None, prog: str = "eval_linear.py") -> NoReturn:
    """`rdm eval` as a script, for torchrun."""
    _run("eval", _words(argv), prog)


def _words(argv: Sequence[str] | None) -> list[str]:
    """The given arguments, else those of this process, which then is a command to its end."""
    if argv is not None:
        return list(argv)
    guard_streams()
    signals.catch()
    return sys.argv[1:]


def _run(name: str, args: Sequence[str], prog: str) -> NoReturn:
    """Run a command to its exit code."""
    debug = "--debug" in args
    try:
        launched()
        if sys.platform not in ("linux", "darwin"):
            raise Unavailable(
                f"rdm-fast runs on Linux (and on macOS, without a GPU), not on {sys.platform}: on "
                "Windows, use WSL"
            )
        command = COMMANDS[name]
        command.run(command.parse(args, prog), list(args))
    except UserError as error:
        if debug:
            print_line(*traceback_of(error).splitlines(), file=sys.stderr)
        _exit_with(error)
    except Exception as error:
        if debug:
            print_line(*traceback_of(error).splitlines(), file=sys.stderr)
        _exit_with(explained(error, "--debug shows where", LOWER.get(name, NEEDS_LESS)))
    signals.ending(0)
    raise SystemExit(0)


def _exit_with(error: UserError) -> NoReturn:
    signals.ending(error.code)
    if speaks():
        print_error(error)
    raise SystemExit(error.code)


# ---- train -----------------------------------------------------------------------------------


def _train(command: TrainCommand, args: list[str]) -> None:
    from rdm_fast.config.saved import config_to_dict
    from rdm_fast.run.folder import read_config

    config = command.config
    if command.resume is not None:
        check_resume_is_alone(args)
        config = replace(read_config(Path(command.resume)), out=command.resume)
    check_ranks(config.optim, command.nproc)
    if command.print_config:
        text: str = yaml.safe_dump(config_to_dict(config), sort_keys=False)
        print_line(*text.splitlines())
        return

    from rdm_fast.training import session

    if (ranks := _ranks_to_start(command.nproc)) > 1:
        check_ranks(config.optim, str(ranks))
        ranked = ["-m", "rdm_fast", "train", *for_ranks(args)]
        session.train_on_ranks(config, ranks, ranked, command.max_restarts)
    session.train(config, overwrite=command.overwrite, allow_change=command.allow_change)


def _ranks_to_start(nproc: str) -> int:
    if nproc == "1":
        return 1
    from rdm_fast.runtime.launch import ranks_on

    ranks = ranks_on(nproc)
    if nproc == "auto":
        print_line(f"--nproc auto: {ranks} rank(s)")
    return ranks


# ---- the other commands ----------------------------------------------------------------------


def _evaluate(command: EvaluateCommand, args: list[str]) -> None:
    if (ranks := _ranks_to_start(command.nproc)) > 1:
        from rdm_fast.runtime.launch import launch

        code, lost = launch(["-m", "rdm_fast", "eval", *for_ranks(args)], ranks)
        if lost:
            raise lost
        raise SystemExit(code)

    from rdm_fast.evaluation.loaded_backbone import load_for_evaluation
    from rdm_fast.evaluation.run import evaluate
    from rdm_fast.runtime import distributed

    device = distributed.choose_device(command.device)
    distributed.start(device, command.timeout)
    try:
        with distributed.raise_rank_lost():
            evaluate(load_for_evaluation(command), command, device)
    finally:
        distributed.stop()


def _doctor(command: DoctorCommand, _: list[str]) -> None:
    from rdm_fast.runtime.distributed import choose_device
    from rdm_fast.tools.doctor.diagnosis import diagnose

    device = choose_device(command.config.device)
    path = Path(command.json) if command.json else None
    diagnose(command.config, device, batches=command.batches, path=path)


def _preview(command: PreviewCommand, _: list[str]) -> None:
    from rdm_fast.tools.preview import preview

    preview(command.config, images=command.images, path=Path(command.sheet))


def _export(command: ExportCommand, _: list[str]) -> None:
    from rdm_fast.evaluation.loaded_backbone import find_checkpoint
    from rdm_fast.tools.export.write import export_checkpoint

    path = find_checkpoint(Path(command.checkpoint))
    out = Path(command.out) if command.out else None
    lines = export_checkpoint(
        path, command.to, branch=command.branch, out=out, overwrite=command.overwrite
    )
    print_line(*lines)


def _report(command: ReportCommand, _: list[str]) -> None:
    from rdm_fast.tools.report.make import make_report

    print_line(f"report: {make_report(command)}")


def _sweep(command: SweepCommand, args: list[str]) -> None:
    from rdm_fast.tools.sweep.make import make_sweep

    check_varied_is_free(command, args)
    make_sweep(command)


COMMANDS = {
    "train": Command(TrainCommand, "Train RECIPE, changing single fields.", _train),
    "eval": Command(
        EvaluateCommand,
        "Linear probe and kNN on the frozen features of a checkpoint.\n\nProtocols: "
        + ", ".join(PROTOCOLS),
        _evaluate,
    ),
    "doctor": Command(
        DoctorCommand,
        "Show what this machine has and lacks, time the parts of a step of RECIPE, and name the "
        "bottleneck.",
        _doctor,
    ),
    "preview": Command(
        PreviewCommand,
        "Draw images of RECIPE's data set beside the views that each loader makes of them.",
        _preview,
    ),
    "export": Command(
        ExportCommand,
        "Write the backbone of a checkpoint for other programs.\n\nTargets:\n"
        + "\n".join(f"  {name}: {what}" for name, what in TARGETS.items()),
        _export,
    ),
    "report": Command(
        ReportCommand,
        "One HTML page that shows runs: curves, spectra, filter response, embeddings.",
        _report,
    ),
    "sweep": Command(
        SweepCommand,
        "Run RECIPE with each of several filters, or every method of a data set (digits_methods); "
        "--out is the folder of all runs.\n\n"
        f"The paper's filters: {', '.join(GRID)}\n\nMethods: {', '.join(METHODS)}",
        _sweep,
    ),
}
