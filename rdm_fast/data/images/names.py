"""Names of files and folders: which are images, splits, classes or litter.

What is not used is counted, so that a run says what it leaves aside (`Ignored`).
"""

import os
import unicodedata
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from rdm_fast.data.images.decode import SUFFIXES, one_line
from rdm_fast.data.images.index import BadFile
from rdm_fast.data.images.tables import NAME
from rdm_fast.errors import DataError
from rdm_fast.runtime.distributed import print0

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "valid", "validation", "test", "testing")
"""Best first: people keep test images for the end, and may not publish their labels."""
SPLIT_NAMES = (*TRAIN_NAMES, *TEST_NAMES)
NOT_READ = (
    *(".arw", ".cr2", ".cr3", ".dng", ".eps", ".exr", ".heic", ".heif", ".hif", ".jxl", ".nef"),
    *(".orf", ".psd", ".raf", ".rw2", ".svg", ".avif", ".jp2"),  # Pillow may lack the last two
)
"""Suffixes of image formats that are not read here."""
LITTER = (
    *("#recycle", "#snapshot", "@eadir", "@recently-snapshot", "@recycle"),  # of file servers
    *("$recycle.bin", "__macosx", "desktop.ini", "lost+found", "system volume information"),
    "thumbs.db",
)
"""What systems leave in folders, in lower case, besides hidden names."""


def is_image(name: str) -> bool:
    """Whether the suffix is that of an image, in any case."""
    return name.lower().endswith(SUFFIXES)


def is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def class_name(name: str) -> str:
    """The name of a class: é is one character, as on Linux, or two, as on a Mac."""
    return unicodedata.normalize("NFC", name)


def numbered_as(
    train: list[str], labels: NDArray[np.int64], classes: list[str], where: str
) -> NDArray[np.int64]:
    """Labels of test images of `classes`, numbered as the training images' classes are.

    Raises:
        DataError: no training image has one of these classes; `where` names the test images.
    """
    number = {name: k for k, name in enumerate(train)}
    used = np.unique(labels[labels >= 0]).tolist()
    if unknown := sorted(classes[k] for k in used if classes[k] not in number):
        raise DataError(
            f"the test images in {where} have the label {one_line(unknown[0])}, which no training "
            "image has: pack both with the same classes"
        )
    numbers = np.array([*(number.get(name, -1) for name in classes), -1], np.int64)
    return numbers[labels]  # the label -1, for none, takes the last


class Ignored:
    """Files that are not used, counted by kind; images among them are listed."""

    def __init__(self) -> None:
        self.images: list[BadFile] = []
        self._first: dict[str, str] = {}
        self._counts: Counter[str] = Counter()

    def add(self, path: str) -> None:
        """Count a file, or a folder of litter, by its name."""
        name = os.path.basename(path)
        suffix = os.path.splitext(name)[1].lower()
        if name.startswith(NAME):  # our own index
            return
        if not is_litter(name):
            kind = suffix or "without a suffix"
            if suffix in NOT_READ:
                self.images.append(BadFile(path, f"{suffix} is not read here"))
        elif name.startswith(".") and name not in (".DS_Store", ".ipynb_checkpoints"):
            kind = "._*" if name.startswith("._") else "hidden"
        else:
            kind = name
        self.count(kind, path)

    def add_image(self, path: str, kind: str) -> None:
        """Count and list an image, or the label of one."""
        self.images.append(BadFile(path, kind))
        self.count(kind, path)

    def count(self, kind: str, path: str) -> None:
        """Count what is no loss."""
        self._first.setdefault(kind, one_line(path))
        self._counts[kind] += 1

    def __str__(self) -> str:
        """Each kind with its number and first path; empty if there is nothing."""
        return ", ".join(f"{n} {k} ({self._first[k]})" for k, n in self._counts.most_common())

    def report(self, folder: str) -> None:
        """Print one line, if there is anything; it is a warning if images are among it."""
        if self._counts:
            kind = "warning" if self.images else "note"
            print0(f"{kind}: not used in {one_line(folder)}, number and first of each kind: {self}")
