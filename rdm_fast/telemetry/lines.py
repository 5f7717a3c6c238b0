"""Files of JSON lines that survive kills, full disks and resumes.

A line is written as soon as it is logged, and never rewritten, so a kill can tear only the last
one. A resumed run first drops the lines after its step, so its files are those of an undisturbed
run.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from rdm_fast.run import schema
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.printing import print_line

Record = dict[str, Any]

STEP = schema.whole()
POSITIONS = ("resumed_step", "step")
"""What places a record in a run, the first that it has."""
SPECTRUM_KEYS = {
    "step": "optimizer steps done",
    "online": "eigenvalues of the online branch's output, largest first, mean over views",
    "target": "eigenvalues of the target branch's output, after its filter",
    "projection": "eigenvalues of the projections, before any predictor or filter",
    "s": "singular values of the rows that the predictor or filter takes, largest first",
    "response": "factor by which each of these directions is scaled; null under the cutoff",
    "alignment": "of the two branches' eigenvectors, from 0 to 1",
}


class Lines:
    """A file of JSON lines. While the disk is full, they wait in memory."""

    def __init__(self, path: Path, kept: list[Record]) -> None:
        """Replace the file by the records in `kept`."""
        atomic_files.replace(path, "".join(_line(record) for record in kept))
        self._path = path
        self._file = atomic_files.appending(path)
        self._size = path.stat().st_size
        self._pending = b""
        self._warned = False

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._pending += _line({"step": step, **metrics}).encode()
        try:
            if os.fstat(self._file.fileno()).st_nlink == 0:  # deleted: what follows shall be kept
                self._file, old = atomic_files.appending(self._path), self._file
                old.close()
                self._size = 0
            written = self._file.write(self._pending)
            if written != len(self._pending):
                raise OSError(f"only {written} of {len(self._pending)} bytes were written")
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._size)  # no half line
            if not self._warned:
                text = f"warning: {self._path.name} waits in memory: {error}"
                print_line(text, file=sys.stderr)
            self._warned = True
        else:
            self._size += written
            self._pending, self._warned = b"", False

    def close(self) -> None:
        self._file.close()


class JsonLines(Lines):
    """`metrics.jsonl`: the environment, then flat records."""

    def __init__(self, path: Path, environment: Record, resumed_step: int = 0) -> None:
        kept = _until(resumed_step, path)
        if not kept or "environment" not in kept[0]:
            kept = [{"environment": environment}, *kept]
        elif [r["environment"] for r in kept if "environment" in r][-1] != environment:
            kept.append({"environment": environment, "resumed_step": resumed_step})
        super().__init__(path, kept)


class SpectrumLines(Lines):
    """`spectrum.jsonl`: the meaning of the keys, then a record for each time spectra were taken.

    An `.npz` archive has its directory at the end, so a kill while appending could lose all of it.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        kept = [record for record in _until(resumed_step, path) if "step" in record]
        super().__init__(path, [{"keys": SPECTRUM_KEYS}, *kept])


def read_spectra(path: Path) -> list[Record]:
    """The records of a `spectrum.jsonl`, in the order of their steps.

    Returns:
        Dictionaries with the `SPECTRUM_KEYS`: step an int, alignment 0-d, the others float64 arrays
        of as many directions as the batch can show, with NaN for null. Empty without such a file.
    """

    def read(key: str, value: Any) -> Any:
        return value if key == "step" else np.asarray(value, dtype=np.float64)

    records = [record for record in _read_lines(path) if "step" in record]
    return [{key: read(key, value) for key, value in record.items()} for record in records]


def _line(record: Mapping[str, Any]) -> str:
    return (
        json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False) + "\n"
    )


def _finite(value: Any) -> Any:
    """null for NaN and infinity; five digits for the numbers of an array."""
    if isinstance(value, np.ndarray):
        values: list[float] = value.tolist()
        return [float(f"{x:.5g}") if math.isfinite(x) else None for x in values]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _until(step: int, path: Path) -> list[Record]:
    return [record for record in _read_lines(path) if _position(record) <= step]


def _read_lines(path: Path) -> list[Record]:
    """All whole records. Damaged ones are left out with a warning, a torn last line without."""
    records, damaged = [], 0
    *lines, _torn = atomic_files.read(path).split(b"\n") if path.exists() else [b""]
    for line in lines:
        record = None
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
        if isinstance(record, dict) and not any(
            schema.wrong(record, {key: STEP}) for key in POSITIONS if key in record
        ):
            records.append(record)
        else:
            damaged += 1
    if damaged:
        text = f"warning: {damaged} line(s) of {path} are damaged and left out"
        print_line(text, file=sys.stderr)
    return records


def _position(record: Record) -> float:
    """The step of a record; 0 for the first environment."""
    for key in POSITIONS:
        if key in record:
            return float(record[key])
    return 0.0 if "environment" in record else math.inf
