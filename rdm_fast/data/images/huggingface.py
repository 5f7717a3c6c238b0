"""Images of Hugging Face's `datasets`: a folder of it, a folder of parquet files, or from the Hub.

Its Arrow files stay on the disk, mapped into memory. An image's bytes are read from there, or from
the file that its row names, and decoded as those of image files are. It reads no pickle and runs
no code of a data set.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rdm_fast.config import DataConfig
from rdm_fast.config.checks import did_you_mean
from rdm_fast.data.images import index
from rdm_fast.data.images.bad_files import report_bad_files
from rdm_fast.data.images.decode import one_line, read_file
from rdm_fast.data.images.deep_images import warn_of_range
from rdm_fast.data.images.folder import listing, require_folder
from rdm_fast.data.images.index import FileEntry, Index
from rdm_fast.data.images.names import TEST_NAMES, TRAIN_NAMES, class_name, numbered_as
from rdm_fast.data.images.sets import ImageSet, Labels, StoredImages, decoded_once
from rdm_fast.errors import (
    DataError,
    InputMissing,
    Unavailable,
    UsageError,
    UserError,
    message_of,
)
from rdm_fast.runtime.distributed import print0, rank

Split = Any
"""datasets.Dataset; importing its type takes seconds."""

ON_THE_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` leaves in a folder of several splits, and of one."""
BATCH = 4096
SAMPLES = 1024
"""Images, evenly spread, whose bytes are part of the digest."""
MOST_DECODED = 4 << 30
"""Bytes of small images that each rank keeps decoded; more are decoded when read."""


class RowImages(StoredImages):
    """Images in the rows of a data set."""

    def __init__(
        self, rows: "_Rows", root: Path, found: Index, labels: Labels | None, classes: list[str]
    ) -> None:
        """The usable ones of `rows`, which the index `found` lists in their order."""
        super().__init__(found, labels, classes)
        self._rows, self._root, self._kept = rows, root, np.flatnonzero(found.usable)

    def name(self, i: int) -> str:
        return one_line(str(self._root / self.indexed_path(i)))

    def _path(self, i: int) -> Path:
        return self._rows.file(int(self._kept[i]))

    def _bytes(self, i: int) -> bytes:
        row = int(self._kept[i])
        embedded = self._rows.embedded(row)
        return read_file(self._path(i), self.name(i)) if embedded is None else bytes(embedded)

    def _content(self, digest: "hashlib._Hash") -> None:
        super()._content(digest)
        for i in np.unique(np.linspace(0, len(self) - 1, SAMPLES).astype(np.int64)).tolist():
            if (data := self._rows.embedded(int(self._kept[i]))) is not None:
                digest.update(data)


class _Rows:
    """The images of a split: each in an Arrow file, or in one of its own that the row names."""

    def __init__(self, split: Split, column: str) -> None:
        self._cells = split.select_columns([column]).with_format("arrow")
        self._column = column
        files = [Path(file["filename"]) for file in split.cache_files]
        self._newest = max(files, key=lambda file: file.stat().st_mtime_ns)
        self.folder = self._newest.parent

    def entries(self, prefix: str) -> Iterator[FileEntry]:
        """Every row as `PREFIX[12] (cat.jpg)`."""
        from pyarrow import compute

        changed = self._newest.stat().st_mtime_ns
        for start in range(0, len(self._cells), BATCH):
            cells = self._cells[start : start + BATCH][self._column]
            sizes = compute.binary_length(compute.struct_field(cells, "bytes")).to_pylist()
            paths = compute.struct_field(cells, "path").to_pylist()
            for row, (size, path) in enumerate(zip(sizes, paths, strict=True), start):
                name = f"{prefix}[{row}]" + (f" ({os.path.basename(path)})" if path else "")
                yield FileEntry(name, *(_status(path) if size is None else (size, changed)))

    def _cell(self, row: int) -> Any:
        return self._cells[row][self._column][0]

    def embedded(self, row: int) -> memoryview | None:
        """The image in the Arrow file, not copied; None if it is not there."""
        data = self._cell(row)["bytes"].as_buffer()
        return None if data is None else memoryview(data)

    def file(self, row: int) -> Path:
        """The file that holds the image; of Arrow files, the newest."""
        cell = self._cell(row)
        named = None if cell["bytes"].is_valid else cell["path"].as_py()
        return Path(named) if named else self._newest

    def opened(self, row: int) -> Path | BinaryIO:
        """The image as a file; an empty one if the row has none."""
        from pyarrow import BufferReader

        data, file = self.embedded(row), self.file(row)
        return file if data is None and file != self._newest else BufferReader(data or b"")


def _status(path: str | None) -> tuple[int, int]:
    """Size and time of change of a file; zeros if it cannot be read, as opening it will say."""
    try:
        found = os.stat(path or "")
    except (OSError, ValueError):
        return 0, 0
    return found.st_size, found.st_mtime_ns


def load_hf(config: DataConfig, split: str, bad_files: Path | None) -> ImageSet:
    """The train or test images of a data set, without those that cannot be used.

    Args:
        config: root, columns, verify, on_bad_image and max_bad.
        split: train or test. An only split is for training, whatever its name.
        bad_files: the table that lists images that cannot be used; None for none.

    Raises:
        InputMissing: there is no such data set or split.
        Unavailable: `datasets` is missing, or the Hub cannot be reached.
        UsageError: the column of images or labels is not clear, or there is none of that name.
        DataError: the data set is damaged, or too many images cannot be used; the message names
            the first.
    """
    splits = _open(config.root)
    name = _find(splits, split, config.root)
    labels, classes = _labels(splits[name], config)
    if split == "test" and labels is not None:
        _, train = _labels(splits[_find(splits, "train", config.root)], config)
        labels, classes = numbered_as(train, labels, classes, config.root), train
    rows = _rows(splits[name], _column(splits[name], "image", config), config.root)
    entries = list(rows.entries(name))
    places = {entry.path: row for row, entry in enumerate(entries)}
    root = Path(config.root).expanduser()
    part = hashlib.sha256(f"{name}\0{config.image_column}".encode()).hexdigest()[:8]

    def usable(*, full: bool) -> RowImages:
        found = index.build(
            rows.folder,
            entries,
            full=full,
            part=part,
            open_file=lambda entry: rows.opened(places[entry.path]),
        )
        bad = [
            b._replace(path=str(root / Path(b.path).relative_to(rows.folder))) for b in found.bad
        ]
        report_bad_files(bad, len(entries), root, config, bad_files)
        images = RowImages(rows, root, found, labels, classes)
        images.bad_files, images.white_level = bad_files, config.white_level
        return images

    images = usable(full=config.verify == "full")
    warn_of_range(images, one_line(config.root))
    try:
        return decoded_once(images, MOST_DECODED)
    except DataError:  # damage that only decoding shows
        return decoded_once(usable(full=True), MOST_DECODED)


# ---- what is in a data set -------------------------------------------------------------------


def _open(root: str) -> dict[str, Split]:
    """The splits of the data set, by name."""
    try:
        import datasets  # slow to import
    except ImportError as error:
        raise Unavailable(
            f"--data.name hf needs Hugging Face's datasets ({message_of(error)}): "
            "pip install 'rdm-fast[hf]'"
        ) from error
    if rank() != 0 or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = Path(root).expanduser()
    is_local = path.exists() or not ON_THE_HUB.fullmatch(root)
    if is_local:
        require_folder(path)
    try:
        if not is_local:
            found = datasets.load_dataset(root)
        elif any((path / name).is_file() for name in SAVED):
            found = datasets.load_from_disk(str(path), keep_in_memory=False)
        elif next(path.rglob("*.parquet"), None):
            found = datasets.load_dataset(str(path.absolute()))
        else:
            raise InputMissing(
                f"--data.root {root} is no Hugging Face data set: looked for "
                f"{' or '.join(SAVED)}, which save_to_disk makes, or *.parquet, found "
                f"{listing(path)}"
            )
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of Arrow, of parquet, of the network
        raise _refused(root, error, is_local) from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


def _refused(root: str, error: Exception, is_local: bool) -> UserError:
    why = message_of(error)
    if error.__cause__ is not None:  # it says more than "while generating the dataset"
        why += f": {message_of(error.__cause__)}"
    if is_local or not isinstance(error, OSError):
        return DataError(f"--data.root {root} cannot be read as a Hugging Face data set ({why})")
    kind = InputMissing if isinstance(error, FileNotFoundError) else Unavailable
    return kind(
        f"--data.root {root} is no folder, and no data set of that name is in the cache of "
        f"datasets or can be fetched ({why}): check the name, or fetch it elsewhere and give the "
        "folder that save_to_disk makes"
    )


def _find(splits: dict[str, Split], split: str, root: str) -> str:
    """The name of the train or test split."""
    words = TRAIN_NAMES if split == "train" else TEST_NAMES
    found = [name for word in words for name in splits if name.lower() == word]
    if split == "train" and len(splits) == 1:
        found = list(splits)
    elif len(splits) == 1:
        found = []
    if not found:
        raise InputMissing(
            f"--data.root {root} has no {split} images: looked for a split {' or '.join(words)}, "
            f"found {', '.join(splits)}"
        )
    if not len(splits[found[0]]):
        raise DataError(f"--data.root {root} has no images in its split {found[0]}")
    return found[0]


def _column(split: Split, kind: str, config: DataConfig) -> str:
    """The column of images or labels that the configuration names, or the only one; "" for none."""
    from datasets import ClassLabel, Image

    given, flag = getattr(config, f"{kind}_column"), f"--data.{kind}-column"
    columns = ", ".join(split.features)
    if given and given not in split.features:
        fix = did_you_mean(given, split.features, f"it has {columns}")
        raise UsageError(f"{flag} {given} is no column of {config.root}: {fix}")
    wanted = Image if kind == "image" else ClassLabel
    found = [name for name, feature in split.features.items() if isinstance(feature, wanted)]
    if given:
        return str(given)
    if len(found) > 1:
        raise UsageError(
            f"--data.root {config.root} has several columns of {kind}s, {', '.join(found)}: name "
            f"one with {flag}"
        )
    if not found and kind == "image":
        raise UsageError(
            f"--data.root {config.root} has no column of type Image among {columns}: name that of "
            f"the images with {flag}"
        )
    if not found:
        print0(
            f"note: --data.root {config.root} has no column of type ClassLabel among {columns}: "
            f"its images have no labels unless {flag} names one"
        )
    return found[0] if found else ""


def _labels(split: Split, config: DataConfig) -> tuple[Labels | None, list[str]]:
    """The labels, -1 for none, and the names of their classes; None if there is no column."""
    from datasets import ClassLabel
    from pyarrow import compute, types

    column = _column(split, "label", config)
    if not column:
        return None, []
    cells = split.select_columns([column]).with_format("arrow")[:][column]
    feature = split.features[column]
    if isinstance(feature, ClassLabel):
        labels = compute.fill_null(cells, -1).to_numpy().astype(np.int64)
        if labels.min() < -1 or labels.max() >= len(feature.names):
            raise DataError(
                f"--data.root {config.root} has labels from {labels.min()} to {labels.max()} in "
                f"its column {column}, but {len(feature.names)} classes"
            )
        return labels, [class_name(name) for name in feature.names]
    is_text = types.is_string(cells.type) or types.is_large_string(cells.type)
    if not is_text and not types.is_integer(cells.type):
        raise UsageError(
            f"--data.label-column {column} holds values of type {cells.type}: name a column of "
            "whole numbers or of text"
        )
    values = cells.to_pylist()
    known = sorted({value for value in values if value is not None and (is_text or value >= 0)})
    number = {value: k for k, value in enumerate(known)}
    labels = np.array([number.get(value, -1) for value in values], np.int64)
    return labels, [class_name(str(value)) for value in known]


def _rows(split: Split, column: str, root: str) -> _Rows:
    """The column of images, undecoded, and checked against damage that reading would not see.

    Raises:
        DataError: it is damaged, or holds something else.
    """
    from datasets import Image

    try:
        images = split.select_columns([column]).cast_column(column, Image(decode=False))
        images.data.validate(full=True)
    except Exception as error:
        raise DataError(
            f"--data.root {root} has no images in its column {column} ({message_of(error)})"
        ) from error
    return _Rows(images, column)
