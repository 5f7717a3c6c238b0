"""The commands: what train.py, eval_linear.py and `rdm` do with their words.

Every mistake of a user ends in one `error:` line and an exit code that says what kind it was
(rdm_fast.errors). torch is loaded only once the command line is known to be good.
"""

import contextlib
import difflib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeVar

import yaml

from rdm_fast.cli.parse import (
    TrainCommand,
    check_ranks,
    parse_doctor,
    parse_evaluate,
    parse_export,
    parse_report,
    parse_sweep,
    parse_train,
    without_nproc,
)
from rdm_fast.config import Config
from rdm_fast.errors import Interrupted, RankLost, UsageError, UserError
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.tools.doctor.options import DoctorCommand
from rdm_fast.tools.export.options import ExportCommand
from rdm_fast.tools.report.options import ReportCommand
from rdm_fast.tools.sweep.options import SweepCommand
from rdm_fast.tools.sweep.queue import LAUNCHED

if TYPE_CHECKING:
    from rdm_fast.run.folder import RunFolder, State

PR_SET_PDEATHSIG = 1  # linux/prctl.h
Command = TypeVar("Command")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """`rdm train ...` and `rdm eval ...`, the same as train.py and eval_linear.py; and others."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: rdm {" + ",".join(COMMANDS) + "} ...; rdm COMMAND --help says more")
        raise SystemExit(0 if words else 2)
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        _exit_with(UsageError(f"unknown command {words[0]}: {hint}"))
    COMMANDS[words[0]](words[1:], f"rdm {words[0]}")


def train(argv: Sequence[str] | None = None, prog: str = "train.py") -> NoReturn:
    """Train, or go on training; the exit code is 0 when the run is complete."""
    words = sys.argv[1:] if argv is None else argv
    _run(lambda: _train(parse_train(words, prog), words), debug="--debug" in words)


def evaluate(argv: Sequence[str] | None = None, prog: str = "eval_linear.py") -> NoReturn:
    """Linear probe and kNN on a checkpoint's frozen features."""
    words = sys.argv[1:] if argv is None else argv
    _run(lambda: _evaluate(parse_evaluate(words, prog), words), debug="--debug" in words)


# ---- errors ----------------------------------------------------------------------------------


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _exit_with(error: UserError) -> NoReturn:
    if _rank() == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(error.code)


def _end_with_launcher() -> None:
    """Have a rank told to stop when its launcher is killed, before it takes seconds to import."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _run(command: Callable[[], None], *, debug: bool) -> NoReturn:
    """Run a command to its exit code."""
    launcher = os.environ.get(LAUNCHED)
    if launcher or "RANK" in os.environ:
        _end_with_launcher()
    if launcher and int(launcher) != os.getppid():  # it was gone before we could ask to be told
        raise SystemExit(Interrupted.code)
    try:
        command()
    except UserError as error:
        if debug:
            traceback.print_exc()
        _exit_with(error)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if debug:
            raise
        _exit_with(
            UserError(f"{type(error).__name__}: {error}; this is a bug, --debug shows where")
        )
    raise SystemExit(0)


# ---- train -----------------------------------------------------------------------------------


def _train(command: TrainCommand, words: Sequence[str]) -> None:
    from rdm_fast.config.saved import config_to_dict
    from rdm_fast.run.folder import RunFolder, read_config

    config = command.config
    if command.resume is not None:
        config = replace(read_config(Path(command.resume)), out=command.resume)
        check_ranks(config, command.nproc)
    if command.print_config:
        print(yaml.safe_dump(config_to_dict(config), sort_keys=False), end="")
        return
    if (ranks := _ranks_to_start(command.nproc)) > 1:
        check_ranks(config, str(ranks))
        _train_on_ranks(ranks, words, RunFolder.open(config.out, config, overwrite=False, rank=1))
    rank = _rank()
    with RunFolder.open(config.out, config, overwrite=command.overwrite, rank=rank) as folder:
        if folder.is_new:
            folder.write_status("running", step=0)
        elif rank == 0:
            folder.accept(config, command.allow_change)
        with _reported(folder):
            _train_in(folder, config, extend=bool(command.allow_change))


def _ranks_to_start(nproc: str) -> int:
    if nproc == "1":
        return 1
    from rdm_fast.runtime.launch import ranks_on

    ranks = ranks_on(nproc)
    if nproc == "auto":
        print(f"--nproc auto: {ranks} rank(s)", flush=True)
    return ranks


def _train_on_ranks(ranks: int, words: Sequence[str], folder: "RunFolder") -> NoReturn:
    """Start the ranks, and end as they did; they write and tell what there is to tell."""
    from rdm_fast.run.folder import read_status
    from rdm_fast.runtime.launch import launch

    command = ["-m", "rdm_fast", "train", *without_nproc(words)]
    code, lost = launch(command, ranks, quiet="--debug" not in words)
    state = ""
    with contextlib.suppress(UserError):
        state = read_status(folder.path)["state"]
    if lost and state == "running":  # no rank was left to tell
        error = RankLost(lost)
        _write_end(folder, "failed", error)
        raise error
    raise SystemExit(Interrupted.code if code > 128 and state == "interrupted" else code)


def _train_in(folder: "RunFolder", config: Config, *, extend: bool) -> None:
    from rdm_fast.run.folder import read_status
    from rdm_fast.runtime import distributed
    from rdm_fast.training.trainer import Trainer

    device = distributed.choose_device(config.device)
    distributed.start(device)
    try:
        if read_status(folder.path)["state"] == "finished" and not extend:
            distributed.print0(
                f"the run in {folder.path} is finished: evaluate it with eval_linear.py, "
                "or start anew with --overwrite or another --out"
            )
            return
        with distributed.lost_ranks_told():
            trainer = Trainer(config, folder, device)
            signal.signal(signal.SIGTERM, _end_unless_failing)
            trainer.fit()
        if distributed.rank() == 0:
            path = f"step-{trainer.step:08d}"
            folder.write_status("finished", step=trainer.step, checkpoint=path)
        distributed.print0(f"finished: {folder.path}")
    finally:
        distributed.stop()


def _end_unless_failing(number: int, _frame: FrameType | None) -> None:
    """SIGTERM, once the trainer no longer takes it: not before a failure under way is told.

    A launcher that sees one rank die ends the others, which are about to say so.
    """
    if sys.exception() is None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def _reported(folder: "RunFolder") -> Iterator[None]:
    """Leave in the run folder how the run ended, if not well."""
    from rdm_fast.run.folder import read_status

    try:
        yield
    except BaseException as error:
        log = folder.logs / f"rank{_rank()}.err"
        with contextlib.suppress(OSError):
            log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        if not isinstance(error, Exception):
            raise
        if isinstance(error, RankLost):
            _report_loss(folder, error)
        if not isinstance(error, UserError):
            error = UserError(f"{type(error).__name__}: {error} (a bug; the traceback is in {log})")
        if _rank() != 0:  # usually all ranks fail alike; rank zero then speaks for them
            time.sleep(1.0)
            status = read_status(folder.path)
            if status["state"] == "running" or status["code"] == RankLost.code:
                print(f"error: rank {_rank()}: {error}", file=sys.stderr, flush=True)
        state: State = "interrupted" if isinstance(error, Interrupted) else "failed"
        _write_end(folder, state, error)
        raise error from None


def _write_end(folder: "RunFolder", state: "State", error: UserError) -> None:
    from rdm_fast.run.folder import read_status

    with contextlib.suppress(OSError, UserError):
        status = read_status(folder.path)
        folder.write_status(
            state, step=status["step"], checkpoint=status.get("checkpoint", ""), code=error.code,
            message=str(error),
        )  # fmt: skip


def _report_loss(folder: "RunFolder", error: RankLost) -> NoReturn:
    """Tell of a lost rank, unless that rank tells of a reason of its own."""
    from rdm_fast.run.folder import read_status

    first = read_status(folder.path)["state"] == "running"
    if first:  # at once, since the launcher is about to end this rank too
        _write_end(folder, "failed", error)
    time.sleep(2.0)  # the rank at fault tells within one
    if first and read_status(folder.path)["code"] == error.code:
        print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(error.code)


# ---- evaluate --------------------------------------------------------------------------------


def _evaluate(command: EvaluateCommand, words: Sequence[str]) -> None:
    if (ranks := _ranks_to_start(command.nproc)) > 1:
        from rdm_fast.runtime.launch import launch

        ranked = ["-m", "rdm_fast", "eval", *without_nproc(words)]
        code, lost = launch(ranked, ranks, quiet=not command.debug)
        if lost:
            raise RankLost(lost)
        raise SystemExit(code)

    from rdm_fast.evaluation.loaded_backbone import find_subject
    from rdm_fast.evaluation.run import evaluate_subject
    from rdm_fast.runtime import distributed

    device = distributed.choose_device(command.device)
    distributed.start(device)
    try:
        evaluate_subject(find_subject(command), command, device)
    finally:
        distributed.stop()


# ---- doctor ----------------------------------------------------------------------------------


def _doctor(command: DoctorCommand) -> None:
    from rdm_fast.runtime.distributed import choose_device
    from rdm_fast.tools.doctor.diagnosis import diagnose

    device = choose_device(command.config.device)
    path = None if command.json is None else Path(command.json)
    diagnose(command.config, device, batches=command.batches, path=path)


# ---- export ----------------------------------------------------------------------------------


def _export(command: ExportCommand) -> None:
    from rdm_fast.evaluation.loaded_backbone import find_checkpoint
    from rdm_fast.tools.export.write import export_checkpoint

    path = find_checkpoint(Path(command.checkpoint))
    out = Path(command.out) if command.out is not None else None
    print(export_checkpoint(path, command.to, out=out, overwrite=command.overwrite))


# ---- report and sweep ------------------------------------------------------------------------


def _report(command: ReportCommand) -> None:
    from rdm_fast.tools.report.make import make_report

    print(f"report: {make_report(command)}")


def _sweep(command: SweepCommand) -> None:
    from rdm_fast.tools.sweep.make import make_sweep

    make_sweep(command)


# ---- all -------------------------------------------------------------------------------------


def _plain(
    parse: Callable[[Sequence[str], str], Command], run: Callable[[Command], None]
) -> Callable[[Sequence[str], str], NoReturn]:
    """A command from how its words are read, and what is done then."""
    return lambda argv, prog: _run(lambda: run(parse(argv, prog)), debug="--debug" in argv)


COMMANDS: dict[str, Callable[[Sequence[str], str], NoReturn]] = {
    "train": train,
    "eval": evaluate,
    "doctor": _plain(parse_doctor, _doctor),
    "export": _plain(parse_export, _export),
    "report": _plain(parse_report, _report),
    "sweep": _plain(parse_sweep, _sweep),
}
