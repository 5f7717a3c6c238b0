"""Steps that changed nothing because something was not finite: counted, and ended when they go on.

A step is looked at when the next one has been started: by then it is done, and nothing waits.
"""

import torch

from rdm_fast.config import Config
from rdm_fast.errors import NonFinite
from rdm_fast.training.train_step import StepReport


class SkippedSteps:
    """The count of one run.

    Attributes:
        total: steps skipped so far, of those that were looked at.
        in_a_row: of the last ones, with no step applied in between.
    """

    def __init__(self, config: Config, scaler: torch.amp.GradScaler) -> None:
        self._limit = config.log.max_nonfinite
        self._scaler = scaler if config.precision == "fp16" else None
        self._unread: StepReport | None = None
        self.total = self.in_a_row = 0

    def watch(self, report: StepReport) -> None:
        """Look at the step before this one, and keep this one for later."""
        self.read()
        self._unread = report

    def read(self) -> None:
        """Look at the last step now; waits for it.

        Raises:
            NonFinite: log.max_nonfinite steps in a row could not be applied.
        """
        report, self._unread = self._unread, None
        if report is None:
            return
        if report.applied:
            self.in_a_row = 0
            return
        self.total += 1
        # fp16 finds its loss scale by overflowing; below 1 it is not the scale that overflows
        scaling = self._scaler is not None and self._scaler.get_scale() >= 1
        self.in_a_row += 0 if scaling and report.loss_is_finite else 1
        if self.in_a_row >= self._limit:
            raise NonFinite(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a "
                f"row, the last one step {report.number + 1}; no weight was changed by them: lower "
                "--optim.base-lr, or use --precision fp32"
            )
