"""Image files packed in tar files, as WebDataset has them: read at random, not as a stream.

The shards are listed once (`rdm_fast.data.images.tar_members`), and each image is then read from
its place. So the sampler decides the order, and a run resumes exactly, as with image files.
"""

import hashlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rdm_fast.config import DataConfig
from rdm_fast.data.images import index
from rdm_fast.data.images.bad_files import report_bad_files
from rdm_fast.data.images.decode import SUFFIXES, one_line, read_file
from rdm_fast.data.images.deep_images import warn_of_range
from rdm_fast.data.images.folder import listing, require_folder
from rdm_fast.data.images.index import FileEntry, Index
from rdm_fast.data.images.names import TEST_NAMES, TRAIN_NAMES, Ignored, numbered_as
from rdm_fast.data.images.sets import Labels, StoredImages
from rdm_fast.data.images.tar_members import HIDDEN, Member, MemberFile, list_members
from rdm_fast.errors import DataError, InputMissing

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


class ShardImages(StoredImages):
    """Image files in tar files."""

    def __init__(
        self,
        shards: Sequence[Path],
        members: Sequence[Member],
        found: Index,
        labels: Labels,
        classes: list[str],
    ) -> None:
        """The usable ones of `members`, which the index `found` lists in their order.

        `labels` are those of all members, -1 for none.
        """
        super().__init__(found, labels if classes else None, classes)
        self._shards = list(shards)
        self._shard = np.array([m.shard for m in members], np.int64)[found.usable]
        self._offset = np.array([m.offset for m in members], np.int64)[found.usable]

    def name(self, i: int) -> str:
        return one_line(str(self._shards[self._shard[i]].parent / self.indexed_path(i)))

    def _path(self, i: int) -> Path:
        return self._shards[self._shard[i]]

    def _bytes(self, i: int) -> bytes:
        shard, size = self._path(i), int(self._file_sizes[i])
        data = read_file(shard, self.name(i), int(self._offset[i]), size)
        if len(data) < size:
            raise DataError(f"{self.name(i)} has changed: {shard.name} is shorter than it was")
        return data


def load_shards(root: Path, split: str, config: DataConfig, bad_files: Path | None) -> ShardImages:
    """The train or test images of tar files, without those that cannot be used.

    Args:
        root: a folder that holds .tar files or folders train and val (or test) of them; or a
            pattern of training shards, as `train-{0000..0146}.tar`.
        split: train or test. In one folder, these words in the names of shards decide; if no name
            has one, all are for training.
        config: verify, on_bad_image and max_bad.
        bad_files: the table that lists images that cannot be used; None for none.

    Raises:
        InputMissing: there are no such shards.
        DataError: a shard is damaged, the training images have no such class, or too many images
            cannot be used; the message names the first.
    """
    shards = find_shards(root, split)
    folder, part = shards[0].parent, _part(shards)
    members, classes, left_out = list_members(shards, part)
    changed = [shard.stat().st_mtime_ns for shard in shards]
    places = {f"{shards[m.shard].name}/{m.name}": m for m in members}
    ignored = Ignored()
    for path, why in left_out:
        if why == HIDDEN:
            ignored.count(why, path)
        else:
            ignored.add_image(str(folder / path), why)
    if not members:
        other = f"; not used: {ignored}" if left_out else ""
        named = " ".join(f"KEY{suffix}" for suffix in SUFFIXES)
        raise DataError(f"{shards[0]} (--data.root) has no images, named {named}{other}")
    ignored.report(str(folder))
    if len(places) < len(members):
        raise DataError(f"two members of a shard in {folder} have the same name: pack it again")
    labels = np.array([member.label for member in members], np.int64)
    if split == "test":
        labels, classes = _as_in_training(labels, classes, root, folder)

    def open_member(file: FileEntry) -> io.BufferedReader:
        member = places[file.path]
        return io.BufferedReader(MemberFile(shards[member.shard], member.offset, member.size))

    found = index.build(
        folder,
        [FileEntry(path, m.size, changed[m.shard]) for path, m in places.items()],
        full=config.verify == "full",
        part=part,
        open_file=open_member,
    )
    report_bad_files(found.bad, len(members), folder, config, bad_files, ignored.images)
    images = ShardImages(shards, members, found, labels, classes)
    images.bad_files, images.white_level = bad_files, config.white_level
    warn_of_range(images, one_line(str(folder)))
    return images


def _as_in_training(
    labels: Labels, classes: list[str], root: Path, folder: Path
) -> tuple[Labels, list[str]]:
    """Labels and classes of test images, numbered as the training images' classes are.

    Raises:
        DataError: no training image has one of these classes.
    """
    try:
        shards = find_shards(root, "train")
    except InputMissing:
        return labels, classes
    train = list_members(shards, _part(shards)).classes
    return (numbered_as(train, labels, classes, str(folder)), train) if train else (labels, classes)


# ---- which shards ----------------------------------------------------------------------------


def find_shards(root: Path, split: str) -> list[Path]:
    """The tar files of a split, in the order of their names.

    Raises:
        InputMissing: there are none; the message shows what is there.
    """
    is_pattern = RANGE.search(str(root)) and not root.exists()
    if is_pattern or (root.suffix == ".tar" and root.is_file()):
        return _named(root, split)
    require_folder(root)
    words = TRAIN_NAMES if split == "train" else TEST_NAMES
    for word in words:
        if found := _tars(root / word):
            return found
    found = _tars(root)
    chosen = [path for path in found if any(word in path.name for word in words)]
    told_apart = any(word in path.name for path in found for word in ("train", *TEST_NAMES))
    if split == "train" and not told_apart:
        chosen = found
    if not chosen:
        raise InputMissing(
            f"--data.root {root} has no {split} shards: looked for .tar files in "
            f"{' or '.join(words)}, or with that in their names, found {listing(root)}"
        )
    return chosen


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if path.is_file())


def _named(pattern: Path, split: str) -> list[Path]:
    if split == "test":
        raise InputMissing(
            f"--data.root {pattern} names training shards only: for test images give a folder "
            "that holds train and val"
        )
    shards = [Path(path) for path in expand(str(pattern))]
    missing = [path for path in shards if not path.is_file()]
    if missing or not shards:
        raise InputMissing(
            f"--data.root {pattern}: {len(missing)} of {len(shards)} shards do not exist"
            + (f", such as {missing[0]}" if missing else ": give ranges that rise")
        )
    if len({shard.parent for shard in shards}) > 1:
        raise InputMissing(f"--data.root {pattern} names several folders: put shards into one")
    return shards


def expand(pattern: str) -> list[str]:
    """The names that a pattern with {000..146} and {a,b} stands for; none if a range falls."""
    found = RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last, words = found.groups()
    middle = (
        [f"{k:0{len(first)}}" for k in range(int(first), int(last) + 1)]
        if words is None
        else words.split(",")
    )
    head, tail = pattern[: found.start()], expand(pattern[found.end() :])
    return [head + part + end for part in middle for end in tail]


def _part(shards: Sequence[Path]) -> str:
    names = "\0".join(shard.name for shard in shards)
    return hashlib.sha256(os.fsencode(names)).hexdigest()[:8]
