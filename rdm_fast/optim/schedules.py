"""Learning rate and weight decay of every optimizer step.

Both are functions of the step, so a resumed run needs no state of them. They are numbers on the
host that fill tensors on the device, so that a recorded CUDA graph sees each new value.
"""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from rdm_fast.config import OptimConfig


def learning_rate(step: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """The learning rate of one optimizer step.

    Args:
        step: optimizer steps done before this one, from 0 to epochs * steps_per_epoch - 1.
        steps_per_epoch: optimizer steps in one pass over the data.
        optim: peak, length and ends of the schedule.

    Returns:
        warmup_lr at step 0, rising linearly to optim.lr at step W, after warmup_epochs; then half a
        cosine (Loshchilov & Hutter, arXiv:1608.03983) that would reach final_lr one step after the
        last, so no step is spent at a rate of zero. This is BYOL's schedule; solo-learn's, which
        differs only before W, reaches optim.lr at W - 1.
    """
    warmup = optim.warmup_epochs * steps_per_epoch
    if step < warmup:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup
    progress = (step - warmup) / (optim.epochs * steps_per_epoch - warmup)
    return _cosine(optim.lr, optim.final_lr, progress)


def weight_decay(step: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """The weight decay of one optimizer step; arguments as of `learning_rate`.

    Returns:
        optim.weight_decay at step 0, then half a cosine that would reach weight_decay_end one step
        after the last, without warm-up: DINO's `cosine_scheduler`.
    """
    progress = step / (optim.epochs * steps_per_epoch)
    return _cosine(optim.weight_decay, optim.last_weight_decay, progress)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Set the learning rate of every group that is not fixed."""
    for group in optimizer.param_groups:
        if not group.get("fixed_lr", False):
            _set(group, "lr", value)


def set_weight_decay(optimizer: Optimizer, value: float) -> None:
    """Set the weight decay of every group that is not excluded from it."""
    for group in optimizer.param_groups:
        if group["adapt"]:
            _set(group, "decay" if "decay" in group else "weight_decay", value)


def _set(group: dict[str, Any], name: str, value: float) -> None:
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value
