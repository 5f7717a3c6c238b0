"""All writers of a rank, used as one."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from rdm_fast.config import Config
from rdm_fast.run.folder import RunFolder
from rdm_fast.telemetry.console import ConsoleLine, Plan
from rdm_fast.telemetry.keys import Metrics
from rdm_fast.telemetry.lines import JsonLines, SpectrumLines
from rdm_fast.telemetry.trackers import TensorBoard, Trackio, WeightsAndBiases


class Writer(Protocol):
    """Takes the metrics of one moment somewhere."""

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
        """The writers that a configuration asks for; none on ranks other than zero.

        Args:
            folder: where the files go. Lines and events after `plan.resumed_step` are dropped.
            environment: from `rdm_fast.run.environment.describe_environment`.

        Raises:
            Unavailable: TensorBoard, W&B or trackio is asked for and not installed.
        """
        if folder.rank != 0:
            return cls()
        writers: list[Writer] = []
        if config.log.tensorboard:
            writers.append(TensorBoard(folder.tensorboard, plan.resumed_step))
        if config.log.wandb:
            writers.append(WeightsAndBiases(folder, environment))
        if config.log.trackio:
            writers.append(Trackio(folder, environment))
        writers.append(JsonLines(folder.metrics, environment, plan.resumed_step))
        writers.append(ConsoleLine(plan))
        spectra = None
        if config.log.spectrum_every:
            spectra = SpectrumLines(folder.spectrum, plan.resumed_step)
        return cls(writers, spectra)

    def log(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of a step. Values are Python numbers: whoever has a tensor decides
        when to wait for it. Log before saving a checkpoint of the same step, so that no resumed
        run lacks a line."""
        for writer in self._writers:
            writer.log(step, metrics)

    def log_spectra(self, step: int, spectra: Mapping[str, np.ndarray | float]) -> None:
        """Write the spectra of a step to `spectrum.jsonl`, under `SPECTRUM_KEYS`."""
        if self._spectra is not None:
            self._spectra.log(step, spectra)

    def close(self) -> None:
        """Flush everything, and give the console back."""
        for writer in self._writers:
            writer.close()
        if self._spectra is not None:
            self._spectra.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
