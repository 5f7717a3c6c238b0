"""A run folder with a checkpoint of random weights, without training."""

from pathlib import Path

import torch
from torch import nn

from rdm_fast.config import Config
from rdm_fast.methods import Method, build_method
from rdm_fast.models.pretrained import file_note
from rdm_fast.run import checkpoint
from rdm_fast.run.checkpoint import Snapshot
from rdm_fast.run.folder import RunFolder


def save_random(path: Path, config: Config, step: int = 1) -> tuple[Path, Method]:
    """The step folder, and the method whose weights and statistics it holds."""
    torch.manual_seed(1)
    method = build_method(config)
    for module in method.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    with RunFolder.open(str(path), config, overwrite=False, rank=0) as folder:
        snapshot = Snapshot(step, dict(method.state_dict()), {}, {}, {})
        return checkpoint.save(folder.checkpoints, snapshot, 2, file_note(config)), method.eval()
