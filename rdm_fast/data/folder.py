"""Image files in folders: ROOT/train/<class>/<file> and ROOT/val or test/..., or without labels.

Rules: files are taken by their suffix, at any depth under a class; names that start with a dot
are ignored; links are followed, but no folder or file is visited twice, so a loop of links ends
and a file with two names counts once. A class folder without images gets no label. Classes are
numbered in the order of their names in train, for every split.
"""

import os
from pathlib import Path

import numpy as np

from rdm_fast.data.images import FileImages
from rdm_fast.errors import DataError, InputMissing

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
TEST_NAMES = ("val", "test")
SHOWN = 6

Found = tuple[str, int]
"""Path relative to the split's folder, and size in bytes."""


def load_folder(root: Path, split: str) -> FileImages:
    """The train or test images of a folder.

    Raises:
        InputMissing: the folder has no such split.
        DataError: the split holds no images, mixes labelled and unlabelled ones, or some files
            cannot be read as images; the first is named.
    """
    folder = _split_folder(root, split)
    classes, loose = _scan(folder, flat=folder == root)
    if any(classes.values()) and loose:
        raise DataError(
            f"{folder} has images beside class folders, such as {loose[0][0]}: "
            "put every image into a class folder, or none"
        )
    if not loose and not any(classes.values()):
        raise DataError(
            f"{folder} (--data.root) has no images: expected <class>/<image> or <image>, "
            f"named {' '.join(SUFFIXES)}; found {listing(folder)}"
        )
    if loose:
        return FileImages(
            folder, [path for path, _ in loose], [size for _, size in loose], None, []
        )
    names = [name for name, found in classes.items() if found]
    if split == "test" and (root / "train").is_dir():
        names = _train_classes(root, names)
    labels = [names.index(name) for name, found in classes.items() for _ in found]
    files = [file for found in classes.values() for file in found]
    return FileImages(
        folder,
        [path for path, _ in files],
        [size for _, size in files],
        np.array(labels, np.int64),
        names,
    )


def listing(folder: Path) -> str:
    """What is in a folder, for a message."""
    names = sorted(entry.name for entry in folder.iterdir())
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


def _train_classes(root: Path, names: list[str]) -> list[str]:
    train = [name for name, found in _scan(root / "train", flat=False)[0].items() if found]
    unknown = [name for name in names if name not in train]
    if train and unknown:
        raise DataError(
            f"{root} has the class {unknown[0]} in its test images but not in train: "
            "give both the same class folders"
        )
    return train or names


def _scan(folder: Path, flat: bool) -> tuple[dict[str, list[Found]], list[Found]]:
    """Files under each class folder, in the order of names, and files directly in `folder`.

    With `flat` only the latter: the folders beside them are no classes.
    """
    visited = {_identity(folder.stat())}
    classes: dict[str, list[Found]] = {}
    loose: list[Found] = []
    for entry in _entries(folder):
        if entry.is_dir():
            if not flat:
                classes[entry.name] = _walk(entry, entry.name, visited)
        else:
            loose += _image(entry, entry.name, visited)
    return classes, loose


def _walk(folder: "os.DirEntry[str]", prefix: str, visited: set[tuple[int, int]]) -> list[Found]:
    identity = _identity(folder.stat())
    if identity in visited:
        return []
    visited.add(identity)
    found: list[Found] = []
    for entry in _entries(folder):
        path = f"{prefix}/{entry.name}"
        found += _walk(entry, path, visited) if entry.is_dir() else _image(entry, path, visited)
    return found


def _image(entry: "os.DirEntry[str]", path: str, visited: set[tuple[int, int]]) -> list[Found]:
    if not entry.name.lower().endswith(SUFFIXES):
        return []
    try:
        status = entry.stat()
    except OSError:  # a link to nothing: opening it will say so, and name it
        return [(path, 0)]
    if _identity(status) in visited:
        return []
    visited.add(_identity(status))
    return [(path, status.st_size)]


def _entries(folder: "os.PathLike[str]") -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if not entry.name.startswith(".")]
    except PermissionError as error:
        raise DataError(f"{os.fspath(folder)} may not be read: check its permissions") from error
    return sorted(seen, key=lambda entry: entry.name)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
