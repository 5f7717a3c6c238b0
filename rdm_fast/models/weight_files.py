"""Files of weights from any trainer: read as data alone, checked for size, and loaded strictly.

The tensors may lie at the top of a file or in tables inside it, such as `state_dict`, `student` or
`ema`. Nothing in a file runs, and none may claim much more than its bytes.
"""

import json
import pickletools
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rdm_fast.config import RESNETS, TIMM, Stem
from rdm_fast.errors import DataError, InputMissing, is_out_of_memory, message_of
from rdm_fast.run import schema
from rdm_fast.runtime.untrusted import RATIO, SLACK, require_header, require_zip

METADATA = "rdm_fast"
"""Where files written by rdm-fast note as JSON what tensors do not show: a key of a safetensors
file's header, or of the dictionary in a pickle."""
NOTE: schema.Schema = {
    "backbone": schema.one_of(RESNETS),
    "stem": schema.one_of(get_args(Stem)),
}
TIMM_NOTE: schema.Schema = {
    "backbone": schema.text(f"{TIMM}[A-Za-z0-9_]+", f"{TIMM}NAME"),
    "patch_size": schema.whole(0, 1024),
    "input_size": schema.Field(
        "channels and sides in pixels, such as [3, 224, 224]",
        lambda v: (
            isinstance(v, list)
            and len(v) == 3
            and v[0] in (1, 3)
            and all(type(n) is int and 0 < n <= 16_384 for n in v)
        ),
    ),
}
KEYS = (
    *("", "state_dict", "model", "model_state_dict", "net", "network", "backbone", "encoder"),
    *("student", "online", "online_network", "state_dict_ema", "model_ema", "ema", "teacher"),
)
"""Where weights lie in a file, the likeliest first; other keys follow these."""
DEPTH, MOST_TABLES = 4, 32
ZIP = b"PK\x03\x04"
MOST_PICKLE = 1 << 26
"""Bytes of a refused pickle that are searched for what it would use."""
KNOWN = ("torch", "collections", "_codecs")

Tables = dict[str, dict[str, Tensor]]
"""Tensors by name, in tables by the keys that lead to them: `student`, `ema.module`, or nothing."""


def read_tables(path: Path) -> tuple[Tables, dict[str, Any]]:
    """Every table of tensors in a file, the likeliest first, and the note of rdm-fast in it.

    Args:
        path: a .safetensors file, or one from torch.save.

    Raises:
        InputMissing: there is no such file.
        DataError: it cannot be read as data alone, has no tensors by name, or claims more bytes
            than it has.
    """
    if not path.is_file():
        raise InputMissing(f"there is no file {path}: name a checkpoint")
    tables, note = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    claimed = sum(t.numel() * t.element_size() for table in tables.values() for t in table.values())
    size = path.stat().st_size
    if claimed > max(SLACK, RATIO * size):
        raise DataError(f"{path} claims {claimed} bytes of tensors and has {size}: use another")
    return tables, note


def _safetensors(path: Path) -> tuple[Tables, dict[str, Any]]:
    require_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            note = _note(path, (file.metadata() or {}).get(METADATA))
            return {"": {name: file.get_tensor(name) for name in file.keys()}}, note  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = message_of(error)
        raise DataError(f"{path} is not a sound safetensors file ({reason})") from error


def _pickled(path: Path) -> tuple[Tables, dict[str, Any]]:
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP)) == ZIP
    if is_zip:
        require_zip(path, path.stat().st_size)  # torch.save does not compress
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises anything
        raise DataError(f"{path} cannot be read as data alone: {_refusal(path, error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}: use a file of tensors by name")
    found = dict(_tables(content, (), {id(content)}))
    keys = ("teacher", *KEYS) if "dino_loss" in content else KEYS  # DINO evaluates its teacher
    places = sorted(found, key=lambda place: [_rank(key, keys) for key in place])
    return {".".join(place): found[place] for place in places[:MOST_TABLES]}, _note(
        path, content.get(METADATA)
    )


def _tables(
    content: dict[Any, Any], place: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Tables of dense tensors, each once, however often others refer to it."""
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
        and value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    }  # fmt: skip
    if tensors:
        yield place, tensors
    for key, value in content.items():
        inside = isinstance(key, str) and isinstance(value, dict) and id(value) not in seen
        if inside and len(place) < DEPTH and not key.startswith("optim"):
            seen.add(id(value))
            yield from _tables(value, (*place, key), seen)


def _rank(key: str, keys: Sequence[str]) -> int:
    return keys.index(key) if key in keys else len(keys)


def _note(path: Path, text: Any) -> dict[str, Any]:
    """The table under METADATA; empty if there is none.

    Raises:
        DataError: it is no such table.
    """
    if text is None:
        return {}
    note = None
    with suppress(TypeError, ValueError, RecursionError):
        note = json.loads(text)
    if not isinstance(note, dict):
        raise DataError(f"{path} has {METADATA} in its header, which is not a table as JSON")
    of_timm = str(note.get("backbone")).startswith(TIMM)
    schema.require(note, TIMM_NOTE if of_timm else NOTE, f"{path}: {METADATA} in its header")
    return note


def load_strict(module: nn.Module, state: dict[str, Tensor], what: str) -> int:
    """Load weights only if every name and shape fits; returns how many tensors were loaded.

    Args:
        module: keeps its weights untouched on failure.
        state: tensors by the module's own names.
        what: origin of the weights, such as `checkpoint runs/a/checkpoints/step-00000070`.

    Raises:
        DataError: with the numbers of matching, missing, unknown and misshapen tensors; or one is
            of another kind, or not finite.
    """
    own = module.state_dict()
    require_fit(own, state, what)
    module.load_state_dict(state)
    return len(own)


def require_fit(own: dict[str, Tensor], state: dict[str, Tensor], what: str) -> None:
    """Refuse weights unless every name and shape fits, and every number is finite.

    Args:
        own: the tensors that they would replace.
        state, what: as for `load_strict`.

    Raises:
        DataError: as `load_strict`.
    """
    wrong = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(wrong.values()):
        matching = len(own) - len(wrong["missing"]) - len(wrong["of another shape"])
        each = ", ".join(
            f"{len(names)} {kind} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
            for kind, names in wrong.items()
            if names
        )
        raise DataError(
            f"{what} is of another architecture: {matching} of this model's {len(own)} tensors "
            f"match, {each}; use the configuration it was trained with"
        )
    for name, tensor in own.items():
        given = state[name]
        if given.is_floating_point() != tensor.is_floating_point():
            raise DataError(f"{what} has {name} in {given.dtype}, and it must be {tensor.dtype}")
        if not bool(given.isfinite().all()):
            raise DataError(f"{what} has numbers in {name} that are not finite: use another one")


# ---- what a refused file would use -----------------------------------------------------------


def _refusal(path: Path, error: Exception) -> str:
    """Why torch's restricted unpickler refused a file, and what to do; its own text has a page."""
    text = message_of(error)
    if is_out_of_memory(error):
        return f"it asks for more memory than there is ({path.stat().st_size} bytes have it so)"
    found = re.search(r"GLOBAL (\S+)", text)
    if name := found[1] if found else next(_foreign(path), ""):
        save = f"torch.save(torch.load({str(path)!r}, 'cpu', weights_only=False)['state_dict'], "
        return (
            f"unpickling it would use {name}; where you trust it, save only its tensors, with "
            f'python -c "import torch; {save}{str(path.with_suffix(".weights.pth"))!r})"'
        )
    reason = text.rpartition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0]
    return f"it is not a file from torch.save ({reason}); give one, or a .safetensors file"


def _foreign(path: Path) -> Iterator[str]:
    """What a pickle would import from elsewhere than torch, found without unpickling it."""
    with suppress(Exception), path.open("rb") as file:  # it may be anything
        stream: BinaryIO = file
        if zipfile.is_zipfile(path):
            members = zipfile.ZipFile(path)
            name = next(name for name in members.namelist() if name.endswith("data.pkl"))
            stream = members.open(name)  # type: ignore[assignment]
        texts: list[str] = []
        for code, value, _ in pickletools.genops(stream.read(MOST_PICKLE)):
            if code.name == "GLOBAL":
                texts = str(value).split(" ")
            elif isinstance(value, str):
                texts = [*texts[-1:], value]
            if code.name in ("GLOBAL", "STACK_GLOBAL") and texts[0].split(".")[0] not in KNOWN:
                yield ".".join(texts)
