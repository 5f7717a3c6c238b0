"""Reading files that others may have written: sizes are checked before anything is unpacked.

A file of a few bytes can claim terabytes: in the directory of a zip file, in a header, as a hole
on the disk, or as text whose parts refer to each other. Nothing here imports torch.
"""

import json
import math
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from rdm_fast.errors import DataError, message_of
from rdm_fast.runtime import atomic_files

MOST_TEXT, MOST_YAML = 1 << 22, 1 << 18
"""Bytes of a text that is read as a whole: states, lists of names; YAML takes most memory."""
MOST_HEADER = 1 << 24
"""Bytes of a safetensors header; a thousand tensors need a hundredth."""
SLACK = 1 << 28
"""Bytes that a file may unpack to, however small it is; else RATIO of its size."""
RATIO = 20


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """The text of a regular file, UTF-8, without the mark that some editors put before it.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is larger than `most`, or not UTF-8.
    """
    with atomic_files.opened(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"it has {size} bytes, and {most} at most are read")
        return file.read(most).decode("utf-8-sig")


def read_table(path: Path) -> dict[str, Any]:
    """The table in a .json file, or in another as YAML.

    Raises:
        OSError: it cannot be read.
        DataError: it holds something else, or no text.
    """
    is_json = path.suffix == ".json"
    parse: Callable[[str], Any] = json.loads if is_json else _yaml
    try:
        content = parse(read_text(path, MOST_TEXT if is_json else MOST_YAML))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {message_of(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} cannot be used: it is not a table of settings")
    return content


def _yaml(text: str) -> Any:
    """YAML without references, which a short text could multiply without end.

    Raises:
        ValueError: it is not YAML, or has references.
    """
    import yaml  # here: images are read without it

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it refers to another part of itself (*)")
            return super().compose_node(parent, index)

    try:
        return Plain(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(message_of(error)) from error


def require_zip(path: Path, most: int | None = None) -> None:
    """Refuse a zip file whose directory promises more bytes than its size makes likely.

    Args:
        path: the file.
        most: bytes; by default RATIO of its size, or SLACK.

    Raises:
        DataError: it does, or it has no directory.
    """
    size = path.stat().st_size
    most = max(SLACK, RATIO * size) if most is None else most
    try:
        with zipfile.ZipFile(path) as members:
            unpacked = sum(info.file_size for info in members.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise DataError(f"{path} is not a sound zip file ({message_of(error)})") from error
    if unpacked > most:
        raise DataError(
            f"{path} would unpack from {size} to {unpacked} bytes, more than the {most} that such "
            "a file may have: it is damaged or hostile; where you trust it, save it uncompressed"
        )


def require_header(path: Path) -> None:
    """Refuse a safetensors file whose header is longer than any model needs.

    Raises:
        DataError: it is.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER:
        raise DataError(f"{path} claims a header of {size} bytes: {MOST_HEADER} at most are read")


def require_array(path: Path, name: str) -> None:
    """Refuse an array of an .npz file whose header does not promise the bytes that are there.

    numpy allocates what the header says.

    Raises:
        DataError: it promises others, or Python objects, which only a pickle could hold.
    """
    from numpy.lib import format as npy

    with zipfile.ZipFile(path) as members:
        info = members.getinfo(f"{name}.npy")
        with members.open(info) as file:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, kind = read(file)
            held = info.file_size - file.tell()
    if kind.hasobject:
        _refuse(path, name, "holds Python objects, which are not read: save numbers or text")
    if (promised := math.prod(shape) * kind.itemsize) != held:
        _refuse(path, name, f"promises {promised} bytes and holds {held}")


def _refuse(path: Path, name: str, why: str) -> NoReturn:
    raise DataError(f"{path}: array {name} {why}")


def entries(folder: "str | os.PathLike[str]") -> "list[os.DirEntry[str]]":
    """What is in a folder, by name; nothing if there is no folder."""
    with suppress(FileNotFoundError), os.scandir(folder) as found:
        return sorted(found, key=lambda entry: entry.name)
    return []


def find_odd(entry: "os.DirEntry[str]", foreign: str = "") -> str:
    """The path of a link, pipe, socket or device under an entry, but not in a folder `foreign`."""
    if entry.is_file(follow_symlinks=False):
        return ""
    if not entry.is_dir(follow_symlinks=False):
        return entry.path
    inner = [] if entry.name == foreign else entries(entry.path)
    return next((odd for each in inner if (odd := find_odd(each, foreign))), "")
