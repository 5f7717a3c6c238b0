"""Image files in folders: ROOT/train/<class>/<file> and ROOT/val or test/..., or without labels.

Without a folder train, the folders in ROOT are the classes, or the images in it have no labels.

Files are taken by their suffix, at any depth under a class. Hidden names and the litter of systems
are ignored and counted, as are other files. Links are followed, but no folder or file is visited
twice, so a loop of links ends and a file with two names counts once. A class folder without images
gets no label. Classes are numbered in the order of their names in train, for every split, whether
or not their files are usable.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from rdm_fast.config import DataConfig
from rdm_fast.data.images import index
from rdm_fast.data.images.bad_files import report_bad_files
from rdm_fast.data.images.decode import SUFFIXES, one_line, reason
from rdm_fast.data.images.deep_images import warn_of_range
from rdm_fast.data.images.index import FileEntry
from rdm_fast.data.images.names import (
    SPLIT_NAMES,
    TEST_NAMES,
    TRAIN_NAMES,
    Ignored,
    class_name,
    is_image,
    is_litter,
)
from rdm_fast.data.images.sets import FileImages
from rdm_fast.errors import DataError, InputMissing
from rdm_fast.runtime.distributed import print0
from rdm_fast.runtime.untrusted import read_text

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
    scan = _scan_split(root, split, chosen)
    folder, loose = scan.folder, scan.loose
    if chosen is not None and split == "train":
        _require_classes(folder, scan.classes, chosen, config.classes)
    filled = {name: entries for name, entries in scan.classes.items() if entries}
    if filled and loose and chosen is None:
        raise DataError(
            f"{folder} has images beside class folders, such as {one_line(loose[0].path)}: "
            "put every image into a class folder, or none"
        )
    files = [file for entries in filled.values() for file in entries] or loose
    if not files:
        other = f"; not used: {scan.ignored}" if str(scan.ignored) else ""
        raise DataError(
            f"{folder} (--data.root) has no images: expected <class>/<image> or <image>, "
            f"named {' '.join(SUFFIXES)}; found {listing(folder)}{other}"
        )
    scan.ignored.report(str(folder))
    if filled and folder == root:
        print0(
            f"note: --data.root {one_line(str(root))} has no folder train: the folders in it are "
            f"the classes, {listing(root)}"
        )
    names = list(filled)
    if split == "test" and names:
        names = _train_classes(root, names, chosen)
    labels = np.repeat([names.index(name) for name in filled], [*map(len, filled.values())])
    part = "" if chosen is None else hashlib.sha256("\0".join(chosen).encode()).hexdigest()[:8]
    found = index.build(folder, files, full=config.verify == "full", part=part)
    ignored = [bad._replace(path=str(folder / bad.path)) for bad in scan.ignored.images]
    report_bad_files(found.bad, len(files), folder, config, bad_files, ignored)
    images = FileImages(folder, found, labels.astype(np.int64) if filled else None, names)
    images.bad_files, images.white_level = bad_files, config.white_level
    warn_of_range(images, one_line(str(folder)))
    return images


def read_classes(path: Path) -> list[str]:
    """The names in a class list, sorted: one a line; blank lines and comments (#) do not count.

    Raises:
        InputMissing: there is no such file.
        DataError: it cannot be read, or names nothing.
    """
    try:
        lines = read_text(path).split("\n")
    except FileNotFoundError as error:
        raise InputMissing(f"--data.classes {path} does not exist") from error
    except (OSError, ValueError) as error:
        raise DataError(f"--data.classes {path} cannot be read as a list of names") from error
    names = {class_name(line.strip()) for line in lines}
    names = {name for name in names if name and not name.startswith("#")}
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


def _scan_split(root: Path, split: str, chosen: list[str] | None) -> "_Scan":
    """The images of a split.

    Raises:
        InputMissing: there is no such split; the message shows what is there.
    """
    require_folder(root)
    wanted = TRAIN_NAMES if split == "train" else TEST_NAMES
    folders = sorted(entry.name for entry in _listed(root) if _is_folder(entry))
    for name in wanted:
        same = [folder for folder in folders if folder.lower() == name]
        if same:
            return _Scan(root / (name if name in same else same[0]), chosen=chosen)
    if split == "train":
        scan = _Scan(root, flat=True)
        if scan.loose:
            return scan
        scan = _Scan(root, chosen=chosen, left_out=SPLIT_NAMES)
        if any(scan.classes.values()):
            _require_shallow(root, scan)
            return scan
    also = ", for folders of classes, or for image files" if split == "train" else ""
    raise InputMissing(
        f"--data.root {root} has no {split} images: looked for a folder {' or '.join(wanted)}"
        f"{also}, found {listing(root)}"
    )


def _require_shallow(root: Path, scan: "_Scan") -> None:
    """Refuse classes that hold a split: the root is above that of the data."""
    for entries in scan.classes.values():
        for file in entries:
            *folders, _ = file.path.split("/")
            for depth, name in enumerate(folders):
                if name.lower() in SPLIT_NAMES:
                    below = root.joinpath(*folders[:depth])
                    raise InputMissing(
                        f"--data.root {root} has no folder train, and {below} has {name}: give "
                        f"--data.root {below}"
                    )


def _train_classes(root: Path, names: list[str], chosen: list[str] | None) -> list[str]:
    try:
        scan = _scan_split(root, "train", chosen)
    except InputMissing:
        return names
    train = [name for name, found in scan.classes.items() if found]
    unknown = [name for name in names if name not in train]
    if train and unknown:
        raise DataError(
            f"{root} has the class {unknown[0]} in its test images but not in train: "
            "give both the same class folders"
        )
    return train or names


class _Scan:
    """The files in a folder.

    Attributes:
        classes: files under each class folder, in the order of its names.
        loose: files directly in the folder.
        ignored: all others.
    """

    def __init__(
        self,
        folder: Path,
        *,
        flat: bool = False,
        chosen: list[str] | None = None,
        left_out: tuple[str, ...] = (),
    ) -> None:
        """With `flat`, the folders are no classes; with `chosen`, only those of these names.

        Those named as in `left_out`, in any case, are none either.
        """
        self.folder, self.loose, self.ignored = folder, list[FileEntry](), Ignored()
        self._visited = {_identity(folder.stat())}
        classes: dict[str, list[FileEntry]] = {}
        for entry in self._entries(folder, ""):
            if not _is_folder(entry):
                self.loose += self._image(entry, entry.name)
                continue
            name = class_name(entry.name)
            is_class = chosen is None or name in chosen
            if is_class and not flat and entry.name.lower() not in left_out:
                classes.setdefault(name, []).extend(self._walk(entry, entry.name))
        self.classes = dict(sorted(classes.items()))

    def _walk(self, folder: "os.DirEntry[str]", prefix: str) -> list[FileEntry]:
        identity = _identity(folder.stat())
        if identity in self._visited:
            return []
        self._visited.add(identity)
        found: list[FileEntry] = []
        for entry in self._entries(folder, f"{prefix}/"):
            path = f"{prefix}/{entry.name}"
            found += (self._walk if _is_folder(entry) else self._image)(entry, path)
        return found

    def _image(self, entry: "os.DirEntry[str]", path: str) -> list[FileEntry]:
        if not is_image(entry.name):
            self.ignored.add(path)
            return []
        try:
            status = entry.stat()
        except OSError:  # a link to nothing or to itself: opening it will say so
            return [FileEntry(path, 0, 0)]
        if _identity(status) in self._visited:
            return []
        self._visited.add(_identity(status))
        return [FileEntry(path, status.st_size, status.st_mtime_ns)]

    def _entries(self, folder: "os.PathLike[str]", prefix: str) -> list["os.DirEntry[str]"]:
        """What a folder holds, without litter."""
        found = _listed(folder)
        for entry in found:
            if is_litter(entry.name):
                self.ignored.add(prefix + entry.name)
        return [entry for entry in found if not is_litter(entry.name)]


def _listed(folder: "os.PathLike[str]") -> list["os.DirEntry[str]"]:
    """What a folder holds, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        name = one_line(os.fspath(folder))
        raise DataError(f"{name} cannot be read ({reason(error)}): check it") from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
