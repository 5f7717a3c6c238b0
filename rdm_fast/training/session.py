"""Supervises a run: starts or resumes it in its folder, and records there how it ended.

torch is imported only once the folder has been opened, so a refusal takes no time.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from rdm_fast.config import Config
from rdm_fast.config.run import NEEDS_LESS
from rdm_fast.errors import Interrupted, RankLost, UserError, explained
from rdm_fast.run.folder import RunFolder, State, read_status
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.printing import launched_rank, print_error, traceback_of


def train(config: Config, *, overwrite: bool, allow_change: tuple[str, ...]) -> None:
    """Train in this process, which is the whole run or one rank of it.

    Args:
        config: the run's; `config.out` is its folder.
        overwrite: delete an earlier run there.
        allow_change: settings that may differ from those of the checkpoint.
    """
    rank = launched_rank()
    with RunFolder.open(config.out, config, overwrite=overwrite, rank=rank) as folder:
        if rank == 0 and not folder.is_new:
            folder.accept(config, allow_change)
        with record_failure(folder):
            _train_in(folder, config, extend=bool(allow_change))


def train_on_ranks(config: Config, ranks: int, command: Sequence[str], *, quiet: bool) -> NoReturn:
    """Start `python COMMAND` as several ranks of a run, and exit with their code.

    The ranks write the run folder and print; this process only speaks for a rank that was killed.
    """
    from rdm_fast.runtime.launch import launch

    folder = RunFolder.open(config.out, config, overwrite=False, rank=1)
    code, lost = launch(command, ranks, quiet=quiet)
    state = ""
    with suppress(UserError):
        state = read_status(folder.path)["state"]
    if lost and state == "running":  # no rank has recorded the failure
        error = RankLost(lost)
        _write_end(folder, "failed", error)
        raise error
    raise SystemExit(Interrupted.code if code > 128 and state == "interrupted" else code)


def _train_in(folder: RunFolder, config: Config, *, extend: bool) -> None:
    from rdm_fast.runtime import distributed
    from rdm_fast.training.trainer import Trainer

    device = distributed.choose_device(config.device)
    distributed.start(device)
    try:
        if read_status(folder.path)["state"] == "finished" and not extend:
            distributed.print0(
                f"the run in {folder.path} is finished: evaluate it with eval_linear.py, "
                "or start over with --overwrite or another --out"
            )
            return
        with distributed.raise_rank_lost():
            trainer = Trainer(config, folder, device)
            signal.signal(signal.SIGTERM, _end_unless_failing)
            trainer.fit()
        if distributed.rank() == 0:
            path = f"step-{trainer.step:08d}"
            folder.write_status("finished", step=trainer.step, checkpoint=path)
        distributed.print0(f"finished: {folder.path}")
    finally:
        distributed.stop()


# ---- how a run ends --------------------------------------------------------------------------


def _end_unless_failing(number: int, _frame: FrameType | None) -> None:
    """SIGTERM handler after training; ignores the signal while an error is being reported.

    A launcher that sees one rank die ends the others, which are about to report why.
    """
    if sys.exception() is None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextmanager
def record_failure(folder: RunFolder) -> Iterator[None]:
    """Record a failed run's error in its folder: status.json, and the traceback in logs/.

    Raises:
        UserError: in place of any exception of the block.
        SystemExit: another rank was lost, and the error has been printed.
    """
    try:
        yield
    except BaseException as error:
        log = folder.logs / f"rank{launched_rank()}.err"
        with suppress(OSError):
            atomic_files.replace(log, traceback_of(error))
        if not isinstance(error, Exception):
            raise
        if isinstance(error, RankLost):
            _report_rank_lost(folder, error)
        error = explained(error, f"the traceback is in {log}", NEEDS_LESS)
        if launched_rank() != 0:  # ranks usually fail alike, and rank zero speaks for them
            time.sleep(1.0)
            status = read_status(folder.path)
            if status["state"] == "running" or status["code"] == RankLost.code:
                print_error(error, f"rank {launched_rank()}: ")
        state: State = "interrupted" if isinstance(error, Interrupted) else "failed"
        _write_end(folder, state, error)
        raise error from None


def _report_rank_lost(folder: RunFolder, error: RankLost) -> NoReturn:
    """Report a lost rank, unless that rank reports its own reason."""
    first = read_status(folder.path)["state"] == "running"
    if first:  # at once, since the launcher is about to end this rank too
        _write_end(folder, "failed", error)
    time.sleep(2.0)  # the rank at fault needs about one
    if first and read_status(folder.path)["code"] == error.code:
        print_error(error)
    raise SystemExit(error.code)


def _write_end(folder: RunFolder, state: State, error: UserError) -> None:
    with suppress(OSError, UserError):
        status = read_status(folder.path)
        folder.write_status(
            state, step=status["step"], checkpoint=status.get("checkpoint", ""), code=error.code,
            message=str(error),
        )  # fmt: skip
