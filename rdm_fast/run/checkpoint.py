"""Checkpoints: written atomically, verified by digests when read, and unable to run code.

One checkpoint is one folder, `step-XXXXXXXX/`:

    model.safetensors   optim.safetensors   extra.safetensors   tensors, by name
    state.json          the step and every plain value: counters, configuration, versions
    manifest.json       size and SHA-256 of each file above, and of itself; written last

It is written under a temporary name, flushed, and renamed, so a `step-` folder is complete or
absent. Only then is the oldest deleted. No tensor format detects a flipped bit inside a tensor,
hence the digests. Nothing is pickled: a checkpoint from a stranger is only data.
"""

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rdm_fast.errors import DataError, InputMissing, message_of
from rdm_fast.run import schema
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.untrusted import read_table, read_text, require_header

FORMAT = 1
GROUPS = ("model", "optim", "extra")
FILES = (*(f"{group}.safetensors" for group in GROUPS), "state.json")
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})(\.old)?")
SPACE_FACTOR = 1.2  # free space wanted before a save, as a multiple of its size


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a run after an optimizer step. Loaded tensors are on the CPU."""

    step: int
    model: dict[str, Tensor]
    optim: dict[str, Tensor]
    """By parameter and state key, as `rdm_fast.run.state.flatten_optimizer` returns them."""
    extra: dict[str, Tensor]
    """Any other tensors: the state of the random generator, of an online probe."""
    state: dict[str, Any]
    """JSON values only: finite numbers, strings, booleans, None, lists, string-keyed dicts."""


# ---- writing ---------------------------------------------------------------------------------


def save(
    folder: Path, snapshot: Snapshot, keep: int, note: Mapping[str, str] | None = None
) -> Path:
    """Write a checkpoint durably, then delete the oldest; returns its folder.

    Args:
        folder: of all checkpoints of a run; created if missing. Only one process may save there.
        snapshot: its tensors may be on any device, have any layout, and share storage.
        keep: how many of the newest sound checkpoints to keep, at least 2. Those of later steps
            belong to an abandoned continuation and are deleted.
        note: one entry for the header of model.safetensors.

    Raises:
        OSError: it could not be written, for instance on a full disk. Nothing of it remains and
            earlier checkpoints are untouched, so a later save may succeed.
    """
    if keep < 2:
        raise ValueError(f"log.keep={keep}: at least 2, one may be damaged")
    tensors = {group: _plain(getattr(snapshot, group)) for group in GROUPS}
    state = json.dumps({**snapshot.state, "step": snapshot.step}, indent=1, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    _require_space(folder, sum(t.nbytes for group in tensors.values() for t in group.values()))

    path = folder / f"step-{snapshot.step:08d}"
    temporary = atomic_files.temporary(folder)
    try:
        _write(temporary, tensors, state, {} if note is None else note)
        if path.exists():  # a folder cannot be renamed over another; the old one stays loadable
            atomic_files.remove(aside := path.with_name(path.name + ".old"))
            path.rename(aside)
        temporary.rename(path)
        atomic_files.sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(folder, snapshot.step, keep)
    return path


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies that share no storage, as safetensors requires."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < SPACE_FACTOR * size:
        need = f"needs {SPACE_FACTOR * size / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free"
        raise OSError(errno.ENOSPC, f"no space left: the checkpoint {need}", str(folder))


def _write(
    path: Path, tensors: dict[str, dict[str, Tensor]], state: str, note: Mapping[str, str]
) -> None:
    path.mkdir()
    for group, members in tensors.items():
        file = path / f"{group}.safetensors"
        # One entry: safetensors writes several in random order, and equal states are equal bytes.
        header = dict(note) if note and group == "model" else {"format": "pt"}
        try:
            save_file(members, file, header)
        except SafetensorError as error:  # wraps an OSError, but is none
            raise OSError(errno.EIO, str(error), str(file)) from error
        atomic_files.sync(file)
    atomic_files.create(path / "state.json", state)
    atomic_files.create(path / MANIFEST, _manifest({name: _entry(path / name) for name in FILES}))
    atomic_files.sync(path)


def _entry(file: Path) -> dict[str, int | str]:
    """A file's entry in the manifest."""
    with atomic_files.opened(file) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"size": stream.tell(), "sha256": digest}


def _manifest(files: dict[str, Any]) -> str:
    """The manifest's exact text; its last entry is a digest of the rest."""
    body = {"format": FORMAT, "files": files}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


def _prune(folder: Path, step: int, keep: int) -> None:
    """Delete old and abandoned checkpoints; what cannot be deleted stays for the next save."""
    kept: set[int] = set()
    for at, path in _candidates(folder):
        if at > step or at in kept or len(kept) == keep:
            # renamed first, so that no step- folder is ever incomplete
            gone = atomic_files.temporary(folder)
            with suppress(OSError):
                path.rename(gone)
                atomic_files.remove(gone)
        elif at == step or _is_sound(path):
            kept.add(at)


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first; a replaced `.old` folder sorts after its
    replacement."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := STEP_FOLDER.fullmatch(path.name):
            found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


# ---- reading ---------------------------------------------------------------------------------


def verify(path: Path) -> None:
    """Read every byte of a checkpoint and compare it with the manifest.

    Raises:
        InputMissing: nothing is at this path.
        DataError: it is not a checkpoint, or one of its files is missing, cut short or changed.
    """
    if not path.exists():
        raise InputMissing(f"checkpoint {path} does not exist: give an existing step- folder")
    if not path.is_dir():
        raise DataError(f"{path} is a file: give a checkpoint, which is a folder step-XXXXXXXX")
    try:
        text = read_text(path / MANIFEST)
        files = json.loads(text)["files"]
        intact = isinstance(files, dict) and tuple(files) == FILES and text == _manifest(files)
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise _damaged(path, f"{MANIFEST} cannot be read ({error!r})") from error
    if not intact:
        raise _damaged(path, f"{MANIFEST} was changed, or has a format other than {FORMAT}")
    for name, promised in files.items():
        try:
            size = (path / name).stat().st_size
            if not isinstance(promised, dict) or promised.get("size") != size:
                raise _damaged(path, f"{name} ({size} bytes) is not as long as {MANIFEST} says")
            entry = _entry(path / name)
        except OSError as error:
            raise _damaged(path, f"{name} cannot be read ({error.strerror})") from error
        if entry != promised:
            raise _damaged(path, f"{name} ({entry['size']} bytes) differs from its SHA-256")


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"checkpoint {path} is damaged: {what}; use an older one beside it")


def _is_sound(path: Path, warn: Callable[[str], None] = lambda _: None) -> bool:
    try:
        verify(path)
    except (DataError, InputMissing) as error:
        warn(f"skipped: {error}")
        return False
    return True


def load(path: Path) -> Snapshot:
    """Verify a checkpoint and read it.

    Returns:
        the saved snapshot, bit for bit, contiguous and on the CPU. Tuples in its `state` have
        become lists.

    Raises:
        InputMissing, DataError: as `verify`.
    """
    verify(path)
    try:
        state = read_table(path / "state.json")
        schema.require(state, {"step": _step_of(path)}, f"checkpoint {path}: state.json")
        step = state.pop("step")
        for group in GROUPS:
            require_header(path / f"{group}.safetensors")
        # load_file maps the file into memory; copies survive its deletion
        groups = {
            group: {n: t.clone() for n, t in load_file(path / f"{group}.safetensors").items()}
            for group in GROUPS
        }
    except (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError,
            RecursionError) as error:  # fmt: skip
        why = f"its content is not that of a checkpoint ({message_of(error)})"
        raise _damaged(path, why) from error
    if "skipped_in_a_row" in state:  # written before each part had an entry of its own
        state["skipped"] = {
            "total": state.get("skipped"),
            "in_a_row": state.pop("skipped_in_a_row"),
        }
        state["collapse_guard"] = {"low": state.pop("collapsed_in_a_row", 0)}
    return Snapshot(step=step, state=state, **groups)


def _step_of(path: Path) -> schema.Field:
    """What a checkpoint's state.json may say: the step in its folder's name, where that has one."""
    match = STEP_FOLDER.fullmatch(path.name)
    return schema.whole(*[int(match[1])] * 2) if match else schema.whole()


def newest(folder: Path, warn: Callable[[str], None], *, sweep: bool = False) -> Path | None:
    """The newest sound checkpoint of a run, or None.

    Args:
        folder: of the `step-` folders; it need not exist.
        warn: called with one sentence for each damaged checkpoint that is skipped.
        sweep: delete the remains of killed saves. Only for the process that holds the run.
    """
    if sweep and folder.is_dir():
        for path in folder.glob(f"{atomic_files.TEMPORARY}*"):
            with suppress(OSError):
                atomic_files.remove(path)
    return next((path for _, path in _candidates(folder) if _is_sound(path, warn)), None)


def require_none(folder: Path, named: str) -> None:
    """Refuse to start at step 0 in place of a run whose checkpoints cannot be used any more.

    Args:
        folder: of the `step-` folders, of which none is sound.
        named: the checkpoint that status.json names, if any.

    Raises:
        DataError: all of them are damaged.
        InputMissing: they are gone.
    """
    fix = "restore one from a copy, or start over with --overwrite"
    if any(folder.glob("step-*")):
        raise DataError(f"every checkpoint in {folder} is damaged: {fix}")
    if named:
        raise InputMissing(f"{folder} has no checkpoint, and status.json names {named}: {fix}")
