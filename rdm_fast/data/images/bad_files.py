"""Image files that cannot be used: left out, replaced, listed, and counted against data.max_bad.

Up to `allowed_bad` files may be bad. Files that the index finds bad are left out of the data set.
A file that turns bad later (it vanished, changed its size, or has damage that only decoding shows)
keeps its place in the order, so that nothing else moves: the next readable image is shown in its
place, drawn as that image is drawn in this epoch. Evaluation has no order, and leaves it out.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rdm_fast.config import DataConfig
from rdm_fast.data.images.decode import Pixels, one_line
from rdm_fast.data.images.index import BadFile
from rdm_fast.data.images.sets import ImageSet
from rdm_fast.errors import CannotCreate, DataError, printable
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.distributed import print0, rank
from rdm_fast.runtime.printing import print_line

HEADER = "path\treason\n"
FEW_BAD = 3
"""Bad files that are always allowed, unless data.max_bad is 0."""
NEIGHBORS = 16
"""Images to try before blaming the storage."""


def allowed_bad(config: DataConfig, total: int) -> int:
    """How many of all images may be bad: the share data.max_bad, and at least FEW_BAD."""
    return max(FEW_BAD, int(config.max_bad * total)) if config.max_bad else 0


def report_bad_files(
    bad: list[BadFile],
    total: int,
    folder: Path,
    config: DataConfig,
    listing: Path | None,
    ignored: Sequence[BadFile] = (),
) -> None:
    """List the files that the index found bad (on rank zero); stop if they are too many.

    Args:
        bad: the files.
        total: number of files, good and bad.
        folder: where they are, for the message.
        config: on_bad_image and max_bad.
        listing: the table to write; None for none.
        ignored: images that are listed with them, and do not count.

    Raises:
        CannotCreate: the table cannot be written.
        DataError: data.on_bad_image is stop, or more files are bad than `allowed_bad`, or all
            are; the message names the first.
    """
    if listing is not None and rank() == 0:
        try:
            atomic_files.remove(listing)  # from an earlier start
            if bad or ignored:
                rows = (f"{one_line(f.path)}\t{printable(f.reason)}\n" for f in (*bad, *ignored))
                atomic_files.replace(listing, HEADER + "".join(rows))
        except OSError as error:
            raise CannotCreate(f"{listing} cannot be written ({error.strerror})") from error
    if not bad:
        return
    listed = f", all in {listing}" if listing is not None else ""
    found = (
        f"{len(bad)} of {total} images under {one_line(str(folder))} cannot be used{listed}; the "
        f"first is {one_line(bad[0].path)} ({bad[0].reason})"
    )
    if config.on_bad_image == "stop" or len(bad) == total:
        raise DataError(f"{found}: repair or remove them")
    if len(bad) > (allowed := allowed_bad(config, total)):
        raise DataError(
            f"{found}: repair or remove them, or allow more than {allowed} with --data.max-bad, a "
            f"share of all (now {config.max_bad:g})"
        )
    print0(f"warning: {found}: they are left out")


def read_or_next(images: ImageSet, i: int, config: DataConfig) -> tuple[int, Pixels]:
    """Image i, or the first readable one after it, with its index.

    Raises:
        DataError: image i cannot be read and data.on_bad_image is stop, or none of NEIGHBORS
            images can be read; the message names the first.
    """
    if config.on_bad_image == "stop":
        return i, images.read(i)
    first: DataError | None = None
    for candidate in range(i, i + min(NEIGHBORS, len(images))):
        try:
            return candidate % len(images), images.read(candidate % len(images))
        except DataError as error:
            first = first or error
    raise DataError(f"{first}, nor can any of the {NEIGHBORS - 1} images after it") from first


class UnreadableImages:
    """Images of this rank that turned bad after the index inspected them."""

    def __init__(
        self, images: ImageSet, config: DataConfig, outcome: str = "the next image takes its place"
    ) -> None:
        """`outcome` completes the warning."""
        self._images, self._config, self._outcome = images, config, outcome
        self.indices: set[int] = set()
        self._has_warned = False

    def note(self, asked: NDArray[np.int64], shown: NDArray[np.int64]) -> None:
        """Add the images that were replaced by others, as `add` does.

        Of those that were shown, one file is checked: if it has changed since it was inspected, one
        warning counts those of the batch.
        """
        for i in asked[asked != shown].tolist():
            self.add(i)
        if self._has_warned or not self._images.has_changed(int(shown[0])):
            return
        self._has_warned = True
        count = sum(map(self._images.has_changed, shown.tolist()))
        print_line(
            f"warning: rank {rank()}: {count} of {len(shown)} images of a batch, such as "
            f"{self._images.name(int(shown[0]))}, have changed since they were inspected: the run "
            "trains on them as they are now, and cannot be repeated"
        )

    def add(self, i: int) -> None:
        """List and count image i, with one warning for the first image.

        Raises:
            DataError: more images are unreadable than `allowed_bad`, or data.on_bad_image is
                stop.
        """
        if i in self.indices:
            return
        self.indices.add(i)
        name, config = self._images.name(i), self._config
        try:
            self._images.read(i)
            why = f"{name} could not be read for a moment"
        except DataError as error:
            if config.on_bad_image == "stop":
                raise
            why = str(error)
        listed_before = self._list(name, why.removeprefix(name).strip())
        if len(self.indices) > allowed_bad(config, len(self._images)):
            raise DataError(
                f"{why}; with it rank {rank()} lost {len(self.indices)} of {len(self._images)} "
                f"images, more than --data.max-bad {config.max_bad:g}: repair them and run "
                "the same command again, or allow more"
            )
        if len(self.indices) == 1 and not listed_before:
            listing = self._images.bad_files
            more = f", and further ones are only listed in {listing}" if listing else ""
            print_line(f"warning: rank {rank()}: {why}: {self._outcome}{more}")

    def _list(self, name: str, why: str) -> bool:
        """Append an image to the table; return whether it was there already."""
        listing = self._images.bad_files
        if listing is None:
            return False
        with suppress(OSError), atomic_files.appending(listing) as table:
            table.seek(0)
            known = table.read()
            if f"\n{name}\t".encode() in known:
                return True
            table.write(f"{'' if known else HEADER}{name}\t{why}\n".encode())
        return False
