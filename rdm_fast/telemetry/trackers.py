"""TensorBoard, W&B and trackio: extras, each asked for by its flag and never by default."""

import importlib
from pathlib import Path
from typing import Any

from rdm_fast.errors import Unavailable
from rdm_fast.run.folder import RunFolder
from rdm_fast.telemetry.keys import Metrics

PROJECT = "rdm-fast"


class TensorBoard:
    """Event files, one scalar a key. Events after the resumed step are hidden by TensorBoard."""

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        module = _optional("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        for key, value in metrics.items():
            if isinstance(value, float | int):
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run that is continued under the same id when the training is."""

    def __init__(self, folder: RunFolder, environment: dict[str, Any]) -> None:
        self._run = _optional("wandb", "wandb").init(
            project=PROJECT,
            id=folder.id,
            resume="allow",
            dir=str(folder.path),
            config=environment,
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A trackio run, which trackio finds again by its name: the run folder's id.

    It keeps its data in a folder of its own (TRACKIO_DIR), not in the run folder.
    """

    def __init__(self, folder: RunFolder, environment: dict[str, Any]) -> None:
        self._run = _optional("trackio", "trackio").init(
            project=PROJECT, name=folder.id, resume="allow", config=environment
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
            f"--log.{extra} needs a package that is not installed: "
            f'pip install "rdm-fast[{extra}]", or leave --log.{extra} out'
        ) from error
