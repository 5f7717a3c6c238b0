"""A long run: it takes every planned step, and memory stays where the first steps left it."""

import resource
from dataclasses import replace
from pathlib import Path

import pytest

from rdm_fast.config import LogConfig
from rdm_fast.training.train_step import StepReport
from rdm_fast.training.trainer import Trainer
from tests.runs import run
from tests.tiny import tiny

STEPS_PER_EPOCH = 50
GROWTH = 4096  # KiB: what an allocator may round, a 15th of one batch's activations a step


def peak() -> int:
    """The most memory this process has used so far, KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("steps", [250, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_long_run_takes_the_planned_steps_and_needs_no_more_memory(
    steps: int, tmp_path: Path
) -> None:
    config = tiny(global_batch=28, epochs=steps // STEPS_PER_EPOCH)
    config = replace(config, log=LogConfig(every=50, knn_every=0, save_every=100))
    peaks, trainers = {}, []

    def after(report: StepReport) -> None:
        peaks[report.number + 1] = peak()

    def prepare(trainer: Trainer) -> None:
        trainers.append(trainer)
        trainer.after_step.append(after)

    run(tmp_path / "run", config, prepare)
    assert trainers[0].step == trainers[0].train_step.total_steps == len(peaks) == steps
    assert trainers[0].skipped.total == 0
    assert peaks[steps] - peaks[100] < GROWTH
