"""Image files in folders: ROOT/train/<class>/<file> and ROOT/val or test/..., or without labels.

Files are taken by their suffix, at any depth under a class; names that start with a dot are
ignored. Links are followed, but no folder or file is visited twice, so a loop of links ends and a
file with two names counts once. A class folder without images gets no label. Classes are numbered
in the order of their names in train, for every split, whether or not their files are usable.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from rdm_fast.config import DataConfig
from rdm_fast.data.images import index
from rdm_fast.data.images.bad_files import report_bad_files
from rdm_fast.data.images.decode import one_line
from rdm_fast.data.images.index import FileEntry
from rdm_fast.data.images.sets import FileImages
from rdm_fast.errors import DataError, InputMissing

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
TEST_NAMES = ("val", "test")
SHOWN = 6

FOLDER = DataConfig(name="folder")


def load_folder(
    root: Path, split: str, config: DataConfig = FOLDER, bad_files: Path | None = None
) -> FileImages:
    """The train or test images of a folder, without those that cannot be used.

    Args:
        root: the folder.
        split: train or test.
        config: classes, verify, on_bad_image and max_bad.
        bad_files: the table that lists files that cannot be used; None for none.

    Raises:
        InputMissing: the folder has no such split, or not every class of data.classes.
        DataError: the split holds no images, mixes labeled and unlabeled ones, or too many files
            cannot be used; the message names the first.
    """
    chosen = read_classes(Path(config.classes).expanduser()) if config.classes else None
    folder = _split_folder(root, split)
    classes, loose = _scan(folder, flat=folder == root, chosen=chosen)
    if chosen is not None and split == "train":
        _require_classes(folder, classes, chosen, config.classes)
    filled = {name: entries for name, entries in classes.items() if entries}
    if filled and loose and chosen is None:
        raise DataError(
            f"{folder} has images beside class folders, such as {one_line(loose[0].path)}: "
            "put every image into a class folder, or none"
        )
    files = [file for entries in filled.values() for file in entries] or loose
    if not files:
        raise DataError(
            f"{folder} (--data.root) has no images: expected <class>/<image> or <image>, "
            f"named {' '.join(SUFFIXES)}; found {listing(folder)}"
        )
    names = list(filled)
    if split == "test" and names and (root / "train").is_dir():
        names = _train_classes(root, names, chosen)
    labels = np.repeat([names.index(name) for name in filled], [*map(len, filled.values())])
    part = "" if chosen is None else hashlib.sha256("\0".join(chosen).encode()).hexdigest()[:8]
    found = index.build(folder, files, full=config.verify == "full", part=part)
    report_bad_files(found.bad, len(files), folder, config, bad_files)
    images = FileImages(folder, found, labels.astype(np.int64) if filled else None, names)
    images.bad_files = bad_files
    return images


def read_classes(path: Path) -> list[str]:
    """The names in a class list, sorted: one a line; blank lines and comments (#) do not count.

    Raises:
        InputMissing: there is no such file.
        DataError: it cannot be read, or names nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise InputMissing(f"--data.classes {path} does not exist") from error
    except (OSError, ValueError) as error:
        raise DataError(f"--data.classes {path} cannot be read as a list of names") from error
    names = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    if not names:
        raise DataError(f"--data.classes {path} names no class: give one a line")
    return sorted(names)


def _require_classes(
    folder: Path, classes: dict[str, list[FileEntry]], chosen: list[str], file: str
) -> None:
    missing = [name for name in chosen if not classes.get(name)]
    if missing:
        raise InputMissing(
            f"{folder} has no images of {len(missing)} of the {len(chosen)} classes in "
            f"--data.classes {file}, such as {missing[0]}; it holds {listing(folder)}"
        )


def listing(folder: Path) -> str:
    """The names in a folder, for a message."""
    names = sorted(one_line(e.name) for e in folder.iterdir() if not e.name.startswith("."))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) + more) or "nothing"


def require_folder(root: Path) -> None:
    """Refuse a data root that is no folder.

    Raises:
        InputMissing: naming --data.root and what is there instead.
    """
    if root.is_dir():
        if not os.access(root, os.R_OK | os.X_OK):
            raise InputMissing(f"--data.root {root} may not be read: check its permissions")
        return
    if root.exists():
        raise InputMissing(f"--data.root {root} is a file: give the folder that holds the data")
    parent = next(parent for parent in root.absolute().parents if parent.is_dir())
    raise InputMissing(f"--data.root {root} does not exist: {parent} holds {listing(parent)}")


def _split_folder(root: Path, split: str) -> Path:
    require_folder(root)
    wanted = ("train",) if split == "train" else TEST_NAMES
    for name in wanted:
        if (root / name).is_dir():
            return root / name
    if split == "train" and _scan(root, flat=True)[1]:
        return root
    also = " or image files" if split == "train" else ""
    raise InputMissing(
        f"--data.root {root} has no {split} images: looked for a folder {' or '.join(wanted)}"
        f"{also}, found {listing(root)}"
    )


def _train_classes(root: Path, names: list[str], chosen: list[str] | None) -> list[str]:
    classes, _ = _scan(root / "train", flat=False, chosen=chosen)
    train = [name for name, found in classes.items() if found]
    unknown = [name for name in names if name not in train]
    if train and unknown:
        raise DataError(
            f"{root} has the class {unknown[0]} in its test images but not in train: "
            "give both the same class folders"
        )
    return train or names


def _scan(
    folder: Path, flat: bool, chosen: list[str] | None = None
) -> tuple[dict[str, list[FileEntry]], list[FileEntry]]:
    """Files under each class folder, in the order of names, and files directly in `folder`.

    With `flat` only the latter: the folders beside them are no classes. With `chosen`, only folders
    of these names.
    """
    visited = {_identity(folder.stat())}
    classes: dict[str, list[FileEntry]] = {}
    loose: list[FileEntry] = []
    for entry in _entries(folder):
        if _is_folder(entry):
            if not flat and (chosen is None or entry.name in chosen):
                classes[entry.name] = _walk(entry, entry.name, visited)
        else:
            loose += _image(entry, entry.name, visited)
    return classes, loose


def _walk(
    folder: "os.DirEntry[str]", prefix: str, visited: set[tuple[int, int]]
) -> list[FileEntry]:
    identity = _identity(folder.stat())
    if identity in visited:
        return []
    visited.add(identity)
    found: list[FileEntry] = []
    for entry in _entries(folder):
        path = f"{prefix}/{entry.name}"
        found += (_walk if _is_folder(entry) else _image)(entry, path, visited)
    return found


def _image(entry: "os.DirEntry[str]", path: str, visited: set[tuple[int, int]]) -> list[FileEntry]:
    if not entry.name.lower().endswith(SUFFIXES):
        return []
    try:
        status = entry.stat()
    except OSError:  # a link to nothing or to itself: opening it will say so
        return [FileEntry(path, 0, 0)]
    if _identity(status) in visited:
        return []
    visited.add(_identity(status))
    return [FileEntry(path, status.st_size, status.st_mtime_ns)]


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: "os.PathLike[str]") -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if not entry.name.startswith(".")]
    except PermissionError as error:
        raise DataError(f"{os.fspath(folder)} may not be read: check its permissions") from error
    return sorted(seen, key=lambda entry: entry.name)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
