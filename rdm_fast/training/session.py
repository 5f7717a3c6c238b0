"""Supervises a run: starts or resumes it in its folder, and records there how it ended.

torch is imported only once the folder has been opened, so a refusal takes no time.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from rdm_fast.config import Config
from rdm_fast.config.run import NEEDS_LESS
from rdm_fast.config.saved import check_resumable, config_to_dict
from rdm_fast.errors import RankLost, UserError, explained
from rdm_fast.run.folder import RunFolder, read_config, read_status, refuse_links
from rdm_fast.runtime import atomic_files, signals
from rdm_fast.runtime.launcher import launched, speaks
from rdm_fast.runtime.printing import print_error, print_line, traceback_of


def train(config: Config, *, overwrite: bool, allow_change: tuple[str, ...]) -> None:
    """Train in this process, which is the whole run or one rank of it.

    Args:
        config: the run's; `config.out` is its folder.
        overwrite: delete an earlier run there.
        allow_change: settings that may differ from those of the checkpoint.
    """
    rank = launched().rank
    if not overwrite and not allow_change and _is_finished(config):
        if rank == 0:
            print_line(
                f"the run in {config.out} is finished: evaluate it with eval_linear.py, or start "
                "over with --overwrite or another --out"
            )
        return
    with RunFolder.open(config.out, config, overwrite=overwrite, rank=rank) as folder:
        if rank == 0 and not folder.is_new:
            folder.accept(config, allow_change)
        with record_failure(folder):
            _train_in(folder, config)


def _is_finished(config: Config) -> bool:
    """Whether the folder holds this run and it is finished. Only reads: the disk may be read-only.

    Raises:
        CannotCreate: the folder holds links.
        ConfigMismatch: it is finished with another configuration.
    """
    path = Path(config.out)
    try:
        if read_status(path)["state"] != "finished":
            return False
        plain = config_to_dict(read_config(path))
    except UserError:  # there is none, or it is damaged: opening the folder says so
        return False
    refuse_links(path)
    check_resumable(plain, config)
    return True


def train_on_ranks(
    config: Config, ranks: int, command: Sequence[str], restarts: int = 0
) -> NoReturn:
    """Start `python COMMAND` as several ranks of a run, and exit with their code.

    The ranks write the run folder and print; this process only speaks for ranks that were killed.
    """
    from rdm_fast.runtime.launch import launch

    folder = RunFolder.open(config.out, config, overwrite=False, rank=1)
    again = [word for word in command if word != "--overwrite"]
    code, lost = launch(command, ranks, restarts=restarts, again=again)
    state = ""
    with suppress(UserError):
        state = read_status(folder.path)["state"]
    if lost and state in ("", "running"):  # no rank has recorded how it ended
        folder.write_end(lost)
        raise lost
    signals.ending(code)
    raise SystemExit(code)


def _train_in(folder: RunFolder, config: Config) -> None:
    from rdm_fast.runtime import distributed
    from rdm_fast.training.trainer import Trainer

    device = distributed.choose_device(config.device)
    distributed.start(device, config.parallel.timeout)
    try:
        with distributed.raise_rank_lost():
            trainer = Trainer(config, folder, device)
            trainer.fit()
        signals.ending(0)
        if distributed.rank() == 0:
            path = f"step-{trainer.step:08d}"
            folder.write_status("finished", step=trainer.step, checkpoint=path)
        distributed.print0(f"finished: {folder.path}")
    finally:
        distributed.stop()


# ---- how a run ends --------------------------------------------------------------------------


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
        rank = launched().rank
        if isinstance(error, Exception):
            signals.ending(error.code if isinstance(error, UserError) else UserError.code)
        log = folder.logs / f"rank{rank}.err"
        with suppress(OSError):
            atomic_files.replace(log, traceback_of(error))
        if not isinstance(error, Exception):
            raise
        if isinstance(error, RankLost):
            _report_rank_lost(folder, error)
        error = explained(error, f"the traceback is in {log}", NEEDS_LESS)
        if not speaks():  # ranks usually fail alike, and rank zero speaks for them
            time.sleep(1.0)
            status = read_status(folder.path)
            if status["state"] == "running" or status["code"] == RankLost.code:
                print_error(error, f"rank {rank}: ")
        folder.write_end(error)
        raise error from None


def _report_rank_lost(folder: RunFolder, error: RankLost) -> NoReturn:
    """Report a lost rank, unless that rank reports its own reason."""
    first = read_status(folder.path)["state"] == "running"
    if first:  # at once, since the launcher is about to end this rank too
        folder.write_end(error)
    time.sleep(1.0)  # the rank at fault needs about one
    if first and read_status(folder.path)["code"] == error.code:
        print_error(error)
    raise SystemExit(error.code)
