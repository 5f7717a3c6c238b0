"""TensorBoard, W&B and trackio: optional, each with a flag of its own."""

import importlib
from pathlib import Path
from typing import Any, Literal

from rdm_fast.errors import Unavailable
from rdm_fast.run.folder import RunFolder
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
    """

    def __init__(
        self, package: Literal["wandb", "trackio"], folder: RunFolder, environment: dict[str, Any]
    ) -> None:
        named = {"id": folder.id, "dir": str(folder.path)}
        self._run = _optional(package, package).init(
            project=PROJECT,
            resume="allow",
            config=environment,
            **(named if package == "wandb" else {"name": folder.id}),
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _optional(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(
            f"--log.{extra} needs a package that is not installed: run pip install "
            f'"rdm-fast[{extra}]", or leave out --log.{extra}'
        ) from error
