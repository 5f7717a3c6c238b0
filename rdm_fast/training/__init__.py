"""One optimizer step: alone or on several ranks, recorded as a CUDA graph, skipped or applied."""

from rdm_fast.training.skipped import SkippedSteps
from rdm_fast.training.train_step import StepReport, TrainStep

__all__ = ["SkippedSteps", "StepReport", "TrainStep"]
