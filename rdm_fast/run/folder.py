"""The folder of one run: ownership, lock, configuration and status.

    run.json       marks a run folder: format, creation time, version, configuration digest
    config.yaml    the whole configuration
    status.json    state of the run, replaced atomically
    bad_files.tsv  skipped image files, and why; bad_test_files.tsv for test images
    metrics.jsonl  spectrum.jsonl  checkpoints/  tensorboard/  logs/  and what other commands add

A folder without run.json belongs to something else and is never written to or emptied. A link in
the place of one of these is refused, since it could lead out of the folder. Nothing here imports
torch, so a refusal takes no time.
"""

import errno
import json
import os
import secrets
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml

from rdm_fast.config import Config
from rdm_fast.config.saved import (
    LATER,
    check_resumable,
    config_digest,
    config_from_dict,
    config_to_dict,
    flat,
)
from rdm_fast.errors import (
    CannotCreate,
    DataError,
    InputMissing,
    Interrupted,
    UserError,
    message_of,
)
from rdm_fast.run import schema
from rdm_fast.runtime import atomic_files, signals
from rdm_fast.runtime.lock import CLAIM, Lock
from rdm_fast.runtime.printing import print_line
from rdm_fast.runtime.untrusted import entries, find_odd, read_table

FORMAT = 1
PROJECT = "rdm-fast"
State = Literal["running", "finished", "interrupted", "failed"]
STATUS: schema.Schema = {
    "state": schema.one_of(get_args(State)),
    "code": schema.whole(0, 255),
    "step": schema.whole(),
    "checkpoint": schema.text(r"(step-\d{8,10})?", "the name of a checkpoint, or empty"),
    "rank": schema.whole(),
    "message": schema.ANY_TEXT,
}
MARK: schema.Schema = {
    "format": schema.whole(1, FORMAT),
    "id": schema.text("[0-9a-f]{8}", "8 hexadecimal digits"),
    "created": schema.ANY_TEXT,
    "version": schema.ANY_TEXT,
    "config_digest": schema.text("[0-9a-f]{16}", "16 hexadecimal digits"),
}
LOCK = "run.lock.json"
LOCKS = (LOCK, LOCK + CLAIM, "run.lock")  # the last is an earlier version's
# All but run.json. config.yaml is deleted first: a folder without it is cleared again, so nothing
# that an interrupted --overwrite leaves can be mistaken for the new run's.
CONTENTS = (
    *("config.yaml", "status.json", "metrics.jsonl", "checkpoints", "spectrum.jsonl"),
    *("tensorboard", "wandb", "logs", "report.html", "figures", "export"),
    *("bad_files.tsv", "bad_test_files.tsv", "evaluation", "wandb.json", "trackio.json"),
)
FOREIGN = "wandb"  # keeps links of its own


def read_config(path: Path) -> Config:
    """The configuration of the run in a folder, for `--resume` and evaluation.

    Raises:
        InputMissing: the folder holds no run.
        DataError: its config.yaml is unusable.
    """
    plain = _read(path / "config.yaml")
    config = config_from_dict(plain)
    with suppress(InputMissing):
        _mark(path)
    present = flat(plain)
    for name in flat(config_to_dict(config)):
        if name not in present and name not in LATER:
            raise DataError(
                f"{path / 'config.yaml'} has no {name}: restore it from a copy, or add the setting "
                "with the value that the run had"
            )
    return config


def read_status(path: Path) -> dict[str, Any]:
    """status.json of the run in a folder. Raises as `read_config`."""
    file = path / "status.json"
    status = _read(file)
    schema.require(status, STATUS, file)
    return status


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_table(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputMissing(f"{file.parent} is not a run folder: it has no {file.name}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {message_of(error)}") from error


# ---- the folder ------------------------------------------------------------------------------


class RunFolder:
    """An opened run folder; rank zero holds its lock until `close`.

    Attributes:
        path: the folder.
        rank: this process's; other ranks than zero only write the status of a failure.
        is_new: rank zero found no earlier run, or has overwritten it.
        id: the run's name for trackers, the same after every resume ("" on other ranks).
    """

    def __init__(self, path: Path, rank: int, *, is_new: bool, id: str, lock: Lock | None) -> None:
        self.path, self.rank, self.is_new, self.id = path, rank, is_new, id
        self.checkpoints, self.logs = path / "checkpoints", path / "logs"
        self.metrics, self.tensorboard = path / "metrics.jsonl", path / "tensorboard"
        self.spectrum = path / "spectrum.jsonl"
        self.bad_files, self.bad_test_files = path / "bad_files.tsv", path / "bad_test_files.tsv"
        self._lock = lock

    @classmethod
    def open(
        cls, out: str, config: Config, *, overwrite: bool, rank: int, patience: float = 0.0
    ) -> Self:
        """Create a run folder, or open that of an earlier run.

        Rank zero locks and marks it, and writes status and config.yaml of a new run; those of an
        earlier run stay until `write_status` and `accept`. Other ranks write nothing.

        Args:
            out: the folder, as in --out. It may be a link itself.
            config: of a new run.
            overwrite: delete an earlier run's contents; other files stay.
            rank: this process's rank.
            patience: seconds to wait for another process that holds the folder.

        Raises:
            CannotCreate: a file is in the way, the folder belongs to something else, holds links
                or is not writable, or another run holds it.
        """
        path = Path(os.path.realpath(out)) if os.path.islink(out) else Path(out)
        try:
            kept = not (overwrite and rank == 0)
            if kept and os.path.lexists(path / "run.json"):
                refuse_links(path)
            _refuse_foreign(path)
            if kept:
                refuse_links(path)
            if rank != 0:
                return cls(path, rank, is_new=False, id="", lock=None)
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path, patience)
            held = cls(path, rank, is_new=False, id="", lock=lock)
            signals.on_end(held._end_by_signal)
            for stale in path.glob(f"{atomic_files.TEMPORARY}*"):
                atomic_files.remove(stale)
            is_new = overwrite or not (path / "config.yaml").exists()
            if is_new:
                for name in CONTENTS:
                    atomic_files.remove(path / name)
            refuse_links(path)
            folder = cls(path, rank, is_new=is_new, id=secrets.token_hex(4), lock=lock)
            if is_new:
                folder._make(config)
            else:
                folder.id = str(_mark(path).get("id"))
            folder.logs.mkdir(exist_ok=True)
            folder.checkpoints.mkdir(exist_ok=True)
            if is_new:
                folder.write_status("running", step=0)
                folder.write_config(config)  # last: it marks the folder as complete
        except OSError as error:
            raise CannotCreate(
                f"--out {out} cannot be written ({error.strerror}): give a folder that can"
            ) from error
        return folder

    def _make(self, config: Config) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        mark = {
            "project": PROJECT, "format": FORMAT, "id": self.id, "created": now,
            "version": version(), "config_digest": config_digest(config),
        }  # fmt: skip
        atomic_files.replace(self.path / "run.json", json.dumps(mark, indent=1) + "\n")

    def restore(self, config: Config) -> bool:
        """Make the folder again if it was deleted or moved while its run goes on (rank zero).

        Returns:
            Whether it was.

        Raises:
            CannotCreate: another process has taken the folder meanwhile.
            OSError: it cannot be made.
        """
        if self._lock is None or self._lock.is_held():
            return False
        self.path.mkdir(parents=True, exist_ok=True)
        refuse_links(self.path)
        self._lock.release()
        self._lock = _lock(self.path, 0.0)
        whole = (self.path / "run.json").exists()  # else only the lock's file was deleted
        if not whole:
            self._make(config)
            self.write_status("running", step=0)
            self.write_config(config)
        self.logs.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        return not whole

    def accept(self, config: Config, allow: tuple[str, ...] = ()) -> None:
        """Check a configuration against config.yaml (`check_resumable`), then replace it.

        A run without a checkpoint accepts any configuration.
        """
        if any(self.checkpoints.glob("step-*")):
            check_resumable(config_to_dict(read_config(self.path)), config, allow)
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        """Replace config.yaml atomically (rank zero)."""
        text: str = yaml.safe_dump(config_to_dict(config), sort_keys=False)
        atomic_files.replace(self.path / "config.yaml", text)

    def write_status(
        self, state: State, *, step: int, code: int = 0, checkpoint: str = "", message: str = ""
    ) -> None:
        """Replace status.json atomically; on a full disk, in place.

        Args:
            state: of the run.
            step: optimizer steps done.
            code: the exit status, which torchrun hides.
            checkpoint: name of the newest checkpoint folder, if any.
            message: the printed error, if any.
        """
        status = {
            "state": state, "code": code, "step": step, "checkpoint": checkpoint,
            "rank": self.rank, "message": message,
        }  # fmt: skip
        file, text = self.path / "status.json", json.dumps(status, indent=1) + "\n"
        try:
            atomic_files.replace(file, text)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            atomic_files.overwrite(file, text)  # a full disk has no room for a second file

    def write_end(self, error: UserError) -> None:
        """Record in status.json, if that can be written, how the run ended."""
        state: State = "interrupted" if isinstance(error, Interrupted) else "failed"
        with suppress(OSError, UserError):
            status = read_status(self.path)
            self.write_status(
                state, step=status["step"], checkpoint=status.get("checkpoint", ""),
                code=error.code, message=str(error),
            )  # fmt: skip

    def _end_by_signal(self, error: UserError) -> None:
        self.write_end(error)
        self.close()

    def close(self) -> None:
        """Release the lock; that of a process that dies without this is taken over."""
        if self._lock is not None:
            signals.on_end(None)
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def version() -> str:
    """The installed version, or `unknown`."""
    try:
        return metadata.version(PROJECT)
    except metadata.PackageNotFoundError:
        return "unknown"


def _mark(path: Path) -> dict[str, Any]:
    file = path / "run.json"
    mark = _read(file)
    if mark.get("project") != PROJECT:
        raise DataError(f"{file} is another program's: its project is not {PROJECT}")
    schema.require(mark, MARK, file)
    return mark


def refuse_links(path: Path) -> None:
    """Refuse a run folder in which a link, pipe or device stands for one of the run's own files.

    Raises:
        CannotCreate: naming it.
    """
    names = {"run.json", *CONTENTS, *LOCKS}
    for entry in entries(path):
        if entry.name in names and (odd := find_odd(entry, FOREIGN)):
            raise CannotCreate(
                f"{odd} is a link or a device, where a run has files of its own, so nothing is "
                "written there: delete it, or give another --out"
            )


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise CannotCreate(f"--out {path} is a file: give a folder")
    names = [entry.name for entry in entries(path)]
    if all(name in LOCKS or name.startswith(atomic_files.TEMPORARY) for name in names):
        return  # empty, or from a start that was killed before it wrote run.json
    with suppress(InputMissing, DataError):
        if _read(path / "run.json").get("project") == PROJECT:
            return
    raise CannotCreate(
        f"--out {path} holds other files and no run, so nothing is written there: give a new or "
        "empty folder"
    )


def _lock(path: Path, patience: float) -> Lock:
    lock = Lock(path / LOCK, lambda text: print_line(f"warning: {text}"))
    if holder := lock.acquire(patience):
        raise CannotCreate(
            f"--out {path} is in use by {holder}: wait for it, stop it, or give another --out; "
            f"delete {path / LOCK} only if that process is gone"
        )
    return lock
