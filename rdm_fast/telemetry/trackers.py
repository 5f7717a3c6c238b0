"""TensorBoard, W&B and trackio: optional, each with a flag of its own."""

import importlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from rdm_fast.errors import Unavailable
from rdm_fast.run.folder import RunFolder
from rdm_fast.runtime import atomic_files
from rdm_fast.telemetry.keys import Metrics

PROJECT = "rdm-fast"


class TensorBoard:
    """Event files with one scalar a key; TensorBoard hides events after the resumed step."""

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        module = _optional("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        for key, value in metrics.items():
            if isinstance(value, float | int):
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class Tracker:
    """A run of W&B or trackio, which a resumed training continues: its name is the folder's id.

    trackio has no run ids and finds a run by its name; its data is in TRACKIO_DIR.

    A run that was killed repeats the steps since its last checkpoint. They are the same, so each
    metric of a step is sent once: PACKAGE.json in the run folder has the newest step, and what of
    it was sent.
    """

    def __init__(
        self, package: Literal["wandb", "trackio"], folder: RunFolder, environment: dict[str, Any]
    ) -> None:
        self._sent = _Sent(folder.path / f"{package}.json", folder.id)
        named = {"id": folder.id, "dir": str(folder.path)}
        self._run = _optional(package, package).init(
            project=PROJECT,
            resume="allow",
            config=environment,
            **(named if package == "wandb" else {"name": folder.id}),
        )

    def log(self, step: int, metrics: Metrics) -> None:
        if new := self._sent.select(step, metrics):
            self._run.log(new, step=step)

    def close(self) -> None:
        self._run.finish()


class _Sent:
    """The newest step of which anything was sent, and the names of its metrics, in a file."""

    def __init__(self, file: Path, run: str) -> None:
        """What the file has of the run with this id."""
        self._file, self._run, self._step, self._keys = file, run, -1, set[str]()
        with suppress(OSError, ValueError, TypeError, KeyError):  # else nothing is known
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved["run"] == run:
                self._step, self._keys = int(saved["step"]), set(map(str, saved["keys"]))

    def select(self, step: int, metrics: Metrics) -> dict[str, Any]:
        """The metrics that were not sent before; noted first, so that none is sent twice."""
        if step < self._step:
            return {}
        known = self._keys if step == self._step else set()
        new = {key: value for key, value in metrics.items() if key not in known}
        if new:
            self._step, self._keys = step, known | new.keys()
            saved = {"run": self._run, "step": step, "keys": sorted(self._keys)}
            with suppress(OSError):  # a full disk: a step may be sent twice
                atomic_files.replace(self._file, json.dumps(saved) + "\n")
        return new


def _optional(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(
            f"--log.{extra} needs a package that is not installed: run pip install "
            f'"rdm-fast[{extra}]", or leave out --log.{extra}'
        ) from error
