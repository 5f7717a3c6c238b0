"""Checkpoints that a crash cannot damage unseen, and that cannot run code.

One checkpoint is one folder, `step-XXXXXXXX/`:

    model.safetensors   optim.safetensors   extra.safetensors   tensors, by name
    state.json          the step and every plain value: counters, configuration, versions
    manifest.json       size and SHA-256 of each file above, and of itself; written last

It is written under a temporary name, flushed, and renamed, so a `step-` folder is complete or not
there; the oldest is deleted only after that. No stock format notices a flipped bit inside a
tensor, hence the digests. There is no pickle anywhere: a checkpoint from a stranger is only data.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rdm_fast.errors import DataError, InputMissing
from rdm_fast.runtime import atomic_files

FORMAT = 1
GROUPS = ("model", "optim", "extra")
FILES = (*(f"{group}.safetensors" for group in GROUPS), "state.json")
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})(\.old)?")
SPACE_FACTOR = 1.2  # free space wanted before a save, as a multiple of its size


@dataclass(frozen=True)
class Snapshot:
    """Everything a run is after some optimizer step. All tensors are on the CPU once loaded."""

    step: int
    model: dict[str, Tensor]
    optim: dict[str, Tensor]
    """What `flatten_optimizer` returns."""
    extra: dict[str, Tensor]
    """Target weights, random-generator states, loss scale: whatever else is a tensor."""
    state: dict[str, Any]
    """JSON values only: finite numbers, strings, booleans, None, lists, string-keyed dicts."""


# ---- writing ---------------------------------------------------------------------------------


def save(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write a checkpoint durably, then delete the oldest; returns its folder.

    Args:
        folder: holds all checkpoints of a run; made if missing. Only one process may save into it.
        snapshot: tensors may lie on any device, in any layout, and share storage.
        keep: newest sound checkpoints to keep, at least 2. Those of a later step than this one
            belong to a continuation that was given up, and go too.

    Raises:
        OSError: it could not be written, for instance for want of space. Nothing of it is left
            and all earlier checkpoints are as they were, so a later save may be tried.
    """
    if keep < 2:
        raise ValueError(f"log.keep={keep}: at least 2, one may be damaged")
    tensors = {group: _plain(getattr(snapshot, group)) for group in GROUPS}
    state = json.dumps({**snapshot.state, "step": snapshot.step}, indent=1, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    _require_space(folder, sum(t.nbytes for group in tensors.values() for t in group.values()))

    path = folder / f"step-{snapshot.step:08d}"
    temporary = folder / f"{atomic_files.TEMPORARY}{os.getpid()}-{snapshot.step}"
    try:
        _write(temporary, tensors, state)
        if path.exists():  # a folder cannot be renamed over another: step aside, still loadable
            shutil.rmtree(aside := path.with_name(path.name + ".old"), ignore_errors=True)
            path.rename(aside)
        temporary.rename(path)
        atomic_files.sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(folder, snapshot.step, keep)
    return path


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies that share no storage, as safetensors wants them."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < SPACE_FACTOR * size:
        need = f"needs {SPACE_FACTOR * size / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free"
        raise OSError(errno.ENOSPC, f"no space left: the checkpoint {need}", str(folder))


def _write(path: Path, tensors: dict[str, dict[str, Tensor]], state: str) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for group, members in tensors.items():
        file = path / f"{group}.safetensors"
        try:
            save_file(members, file, metadata={"format": "pt"})
        except SafetensorError as error:  # not an OSError, though it wraps one
            raise OSError(errno.EIO, str(error), str(file)) from error
        atomic_files.sync(file)
    atomic_files.write(path / "state.json", state)
    atomic_files.write(path / MANIFEST, _manifest({name: _entry(path / name) for name in FILES}))
    atomic_files.sync(path)


def _entry(file: Path) -> dict[str, int | str]:
    """What the manifest says of a file."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"size": stream.tell(), "sha256": digest}


def _manifest(files: dict[str, Any]) -> str:
    """The manifest's exact text. Its own digest is its last entry, so no bit of it goes unseen."""
    body = {"format": FORMAT, "files": files}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


def _prune(folder: Path, step: int, keep: int) -> None:
    """Delete what `save` promises to delete; a deletion that fails is left for the next time."""
    kept: set[int] = set()
    for at, path in _candidates(folder):
        if at > step or at in kept or len(kept) == keep:
            gone = (
                folder / f"{atomic_files.TEMPORARY}{os.getpid()}-gone-{path.name}"
            )  # never half a step- folder
            with suppress(OSError):
                path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        elif at == step or _is_sound(path):
            kept.add(at)


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first, one that stepped aside after its heir."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := STEP_FOLDER.fullmatch(path.name):
            found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


# ---- reading ---------------------------------------------------------------------------------


def verify(path: Path) -> None:
    """Read every byte of a checkpoint and compare it with the manifest.

    Raises:
        InputMissing: there is nothing at this path.
        DataError: it is no checkpoint, or a file of it is missing, cut or changed.
    """
    if not path.exists():
        raise InputMissing(f"there is no checkpoint {path}: name an existing step- folder")
    if not path.is_dir():
        raise DataError(f"{path} is a file: a checkpoint is a folder step-XXXXXXXX of files")
    try:
        text = (path / MANIFEST).read_bytes().decode()
        files = json.loads(text)["files"]
        intact = text == _manifest(files) and tuple(files) == FILES
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise _damaged(path, f"{MANIFEST} cannot be read ({error!r})") from error
    if not intact:
        raise _damaged(path, f"{MANIFEST} was changed, or is not of format {FORMAT}")
    for name, promised in files.items():
        try:
            entry = _entry(path / name)
        except OSError as error:
            raise _damaged(path, f"{name} cannot be read ({error.strerror})") from error
        if entry != promised:
            raise _damaged(path, f"{name} ({entry['size']} bytes) differs from its SHA-256")


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"checkpoint {path} is damaged: {what}; an older one beside it may be sound")


def _is_sound(path: Path, warn: Callable[[str], None] = lambda _: None) -> bool:
    try:
        verify(path)
    except (DataError, InputMissing) as error:
        warn(f"passed over: {error}")
        return False
    return True


def load(path: Path) -> Snapshot:
    """Verify a checkpoint and read it.

    Returns:
        the snapshot that was saved, bit for bit, contiguous and on the CPU. Its `state` has lists
        where tuples were given.

    Raises:
        InputMissing, DataError: as `verify`.
    """
    verify(path)
    try:
        state = json.loads((path / "state.json").read_bytes())
        step = state.pop("step")
        # load_file maps the file into memory: copy, so that deleting it cannot pull it away
        groups = {
            group: {n: t.clone() for n, t in load_file(path / f"{group}.safetensors").items()}
            for group in GROUPS
        }
    except (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError,
            RecursionError) as error:  # fmt: skip
        raise _damaged(path, f"its content is not a checkpoint's ({error})") from error
    if "skipped_in_a_row" in state:  # written before each part had an entry of its own
        state["skipped"] = {"total": state["skipped"], "in_a_row": state.pop("skipped_in_a_row")}
        state["collapse_guard"] = {"low": state.pop("collapsed_in_a_row", 0)}
    return Snapshot(step=step, state=state, **groups)


def newest(folder: Path, warn: Callable[[str], None], *, sweep: bool = False) -> Path | None:
    """The newest sound checkpoint of a run, or None.

    Args:
        folder: holds the `step-` folders; it need not exist.
        warn: called once for each damaged checkpoint that is passed over, with a sentence that
            names it.
        sweep: delete what killed saves left behind. Only for the process that holds the run.
    """
    if sweep and folder.is_dir():
        for path in folder.glob(f"{atomic_files.TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)
    return next((path for _, path in _candidates(folder) if _is_sound(path, warn)), None)


# ---- between tensors by name and live objects ------------------------------------------------


class Stateful(Protocol):
    """An object whose state is tensors and JSON values, in a flat dictionary."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


def flatten_parts(parts: Mapping[str, Stateful]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of named objects: tensors under `<name>/<key>`, other values under their names."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, part in parts.items():
        state = part.state_dict()
        tensors |= {f"{name}/{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        plain[name] = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    return tensors, plain


def restore_parts(parts: Mapping[str, Stateful], snapshot: Snapshot) -> None:
    """Load the state that `flatten_parts` returned; parts without one keep theirs."""
    for name, part in parts.items():
        prefix = f"{name}/"
        found = {
            k.removeprefix(prefix): v for k, v in snapshot.extra.items() if k.startswith(prefix)
        }
        if state := found | snapshot.state.get(name, {}):
            part.load_state_dict(state)


Named = Iterable[tuple[str, nn.Parameter]]


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: Named
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state, by parameter name.

    Args:
        optimizer: of any class whose state holds tensors and plain values.
        named_parameters: names of all its parameters, as `module.named_parameters()` gives them.

    Returns:
        tensors and plain values (numbers, None), both under `<parameter name>/<state key>`.
        Hyper-parameters are not among them: the configuration and the schedule set those.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            target = tensors if isinstance(value, Tensor) else plain
            target[f"{names[id(parameter)]}/{key}"] = value
    return tensors, plain


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Named,
    tensors: dict[str, Tensor],
    plain: dict[str, Any],
) -> None:
    """Give an optimizer the state that `flatten_optimizer` returned, bit for bit.

    Tensors of a parameter's shape take its device and memory layout, as a running optimizer's
    have; a step counter lives where torch wants it (on the host unless fused or capturable).

    Raises:
        DataError: the state is of other parameters.
    """
    named = dict(named_parameters)
    on_device = {
        id(parameter): bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    state: dict[Tensor, dict[str, Any]] = {}
    for path, value in (tensors | plain).items():
        name, _, key = path.rpartition("/")
        parameter = named.get(name)
        if parameter is None or id(parameter) not in on_device:
            raise DataError(f"the checkpoint's optimizer state {path} is of no parameter here")
        if isinstance(value, Tensor):
            if key == "step":
                value = value.to(parameter.device if on_device[id(parameter)] else "cpu", copy=True)
            elif value.shape == parameter.shape:
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            else:
                raise DataError(
                    f"the checkpoint's optimizer state {path} has shape {list(value.shape)}, "
                    f"its parameter here {list(parameter.shape)}"
                )
        state.setdefault(parameter, {})[key] = value
    optimizer.state.clear()
    optimizer.state.update(state)
