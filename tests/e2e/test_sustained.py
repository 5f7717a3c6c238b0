"""A long run: every planned step is taken, and memory stays where the first steps left it."""

import resource
from dataclasses import replace
from pathlib import Path

import torch

from rdm_fast.config import LogConfig
from rdm_fast.run.folder import RunFolder
from rdm_fast.training.train_step import StepReport
from rdm_fast.training.trainer import Trainer
from tests.tiny import tiny

STEPS, WARM = 2000, 400
GROWTH = 4096  # KiB: what an allocator may round, a 40th of one batch's activations a step


def peak() -> int:
    """The most memory this process has used so far, KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_two_thousand_steps_are_the_planned_ones_and_need_no_more_memory(tmp_path: Path) -> None:
    config = tiny(global_batch=28, epochs=40)
    config = replace(config, log=LogConfig(every=50, knn_every=0, save_every=500))
    peaks = {}

    def after(report: StepReport) -> None:
        if report.number + 1 in (WARM, STEPS):
            peaks[report.number + 1] = peak()

    with RunFolder.open(str(tmp_path / "run"), config, overwrite=False, rank=0) as folder:
        trainer = Trainer(config, folder, torch.device("cpu"))
        assert trainer.train_step.total_steps == STEPS
        trainer.after_step.append(after)
        trainer.fit()
    assert trainer.step == STEPS and trainer.skipped.total == 0
    assert peaks[STEPS] - peaks[WARM] < GROWTH
