"""Reads what became of each step, counts those that were skipped, and ends a run of them.

Results are read one step late, so reading them never stalls the GPU.
"""

import torch

from rdm_fast.config import Config
from rdm_fast.data.loaders.workers import no_more_images
from rdm_fast.errors import NonFinite
from rdm_fast.training.train_step import StepReport


class SkippedSteps:
    """The count of one run.

    Attributes:
        total: steps skipped, of those that were read.
        in_a_row: skipped since the last step that was applied.
        newest: the last step that was read.
    """

    def __init__(self, config: Config, scaler: torch.amp.GradScaler) -> None:
        self._limit = config.log.max_nonfinite
        self._scaler = scaler if config.precision == "fp16" else None
        self._unread: StepReport | None = None
        self.newest: StepReport | None = None
        self.total = self.in_a_row = 0

    def watch(self, report: StepReport) -> None:
        """Count the step before this one, and keep this one for later."""
        self.read()
        self._unread = report

    def read(self) -> None:
        """Count the last step now; waits for it.

        Raises:
            NonFinite: log.max_nonfinite steps in a row could not be applied.
            WorkersFailed: a rank had no batch; the step is not counted.
        """
        report, self._unread = self._unread, None
        if report is None:
            return
        self.newest = report
        if report.lost:
            raise no_more_images(report.lost - 1)
        if report.applied:
            self.in_a_row = 0
            return
        self.total += 1
        # fp16 finds its loss scale by overflowing; a scale below 1 is not the cause
        scaling = self._scaler is not None and self._scaler.get_scale() >= 1
        self.in_a_row += 0 if scaling and report.loss_is_finite else 1
        if self.in_a_row >= self._limit:
            raise NonFinite(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a "
                f"row, the last one step {report.number + 1}; no weight was changed by them: lower "
                "--optim.base-lr, or use --precision fp32"
            )

    def state_dict(self) -> dict[str, int]:
        """Both counts, the last step's included."""
        self.read()
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state_dict`."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]
