"""One optimizer step: alone or on several ranks, recorded as a CUDA graph, skipped or applied."""

from rdm_fast.step.skipped import SkippedSteps
from rdm_fast.step.train_step import StepReport, TrainStep

__all__ = ["SkippedSteps", "StepReport", "TrainStep"]
