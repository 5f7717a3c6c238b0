"""`Telemetry`, which passes metrics to every writer of a run."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from rdm_fast.config import Config
from rdm_fast.run.folder import RunFolder
from rdm_fast.telemetry.console import ConsoleLine, Plan
from rdm_fast.telemetry.keys import Metrics
from rdm_fast.telemetry.lines import JsonLines, SpectrumLines
from rdm_fast.telemetry.trackers import TensorBoard, Tracker


class Writer(Protocol):
    """A destination of metrics."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class Telemetry:
    """All writers of this rank, used as one."""

    def __init__(
        self, writers: Sequence[Writer] = (), spectra: SpectrumLines | None = None
    ) -> None:
        self._writers, self._spectra = writers, spectra

    @classmethod
    def open(
        cls, folder: RunFolder, config: Config, environment: dict[str, Any], plan: Plan
    ) -> Self:
        """The writers for a configuration; none on ranks other than zero.

        Args:
            folder: of the files. Lines and events after `plan.resumed_step` are dropped.
            environment: from `rdm_fast.run.environment.describe_environment`.

        Raises:
            Unavailable: TensorBoard, W&B or trackio is requested and not installed.
        """
        if folder.rank != 0:
            return cls()
        writers: list[Writer] = []
        if config.log.tensorboard:
            writers.append(TensorBoard(folder.tensorboard, plan.resumed_step))
        if config.log.wandb:
            writers.append(Tracker("wandb", folder, environment))
        if config.log.trackio:
            writers.append(Tracker("trackio", folder, environment))
        writers.append(JsonLines(folder.metrics, environment, plan.resumed_step))
        writers.append(ConsoleLine(plan))
        spectra = None
        if config.log.spectrum_every:
            spectra = SpectrumLines(folder.spectrum, plan.resumed_step)
        return cls(writers, spectra)

    def log(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of a step, as Python numbers.

        Log before saving a checkpoint of the same step, or a resumed run may lack a line.
        """
        for writer in self._writers:
            writer.log(step, metrics)

    def log_spectra(self, step: int, spectra: Mapping[str, np.ndarray | float]) -> None:
        """Write the spectra of a step, under `SPECTRUM_KEYS`."""
        if self._spectra is not None:
            self._spectra.log(step, spectra)

    def close(self) -> None:
        """Close all writers."""
        for writer in self._writers:
            writer.close()
        if self._spectra is not None:
            self._spectra.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
