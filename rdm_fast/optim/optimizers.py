"""The optimizer of a run, its parameter groups, and the learning rate of every step.

Each optimizer updates all parameters of a group in one launch and never waits for the device:
learning rates are tensors on it, and where the attribute `found_inf`, a 0-d float32 tensor, is 1
the step changes nothing, as in torch's fused optimizers. apex reads `found_inf` on the host, which
is the one wait.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from rdm_fast.config import OptimConfig
from rdm_fast.optim.apex import build_apex_optimizer
from rdm_fast.optim.lars import Lars

PREDICTOR = "predictor."


def parameter_groups(method: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters, grouped by learning rate and weight decay.

    Args:
        method: a learned predictor is its attribute `predictor`.
        optim: says whether the predictor's learning rate is fixed, and whether one-dimensional
            parameters are excluded from decay and LARS's adaptation.

    Returns:
        Up to four groups, each with `params`, `lr`, `weight_decay`, `fixed_lr` (ignored by
        `set_learning_rate`) and `adapt` (scaled by LARS). The order of groups and parameters
        depends only on the architecture and `optim`.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (fixed_lr, excluded): [] for fixed_lr in (False, True) for excluded in (False, True)
    }
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            fixed_lr = optim.fixed_predictor_lr and name.startswith(PREDICTOR)
            excluded = not optim.decay_norm_and_bias and parameter.dim() <= 1
            groups[fixed_lr, excluded].append(parameter)
    return [
        {
            "params": parameters,
            "lr": optim.lr,
            "weight_decay": 0.0 if excluded else optim.weight_decay,
            "fixed_lr": fixed_lr,
            "adapt": not excluded,
        }
        for (fixed_lr, excluded), parameters in groups.items()
        if parameters
    ]


def build_optimizer(method: nn.Module, optim: OptimConfig, device: torch.device) -> Optimizer:
    """The optimizer of a run, over all trainable parameters of a method on `device`.

    Raises:
        Unavailable: optim.backend=apex, and no usable apex is installed.
    """
    groups = parameter_groups(method, optim)
    if optim.backend == "apex":
        return build_apex_optimizer(groups, optim, device)
    for group in groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
    if optim.optimizer == "lars":
        eta, clip = optim.lars_eta, optim.lars_clip
        return Lars(groups, momentum=optim.momentum, trust_coefficient=eta, clip=clip)
    if optim.optimizer == "sgd":
        sgd = SGD(groups, momentum=optim.momentum, fused=True)
        if optim.momentum:
            for parameter in (p for group in groups for p in group["params"]):
                # otherwise uninitialized if the first step is skipped
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return AdamW(groups, fused=True, capturable=device.type == "cuda")


def state_keys(optim: OptimConfig) -> set[str]:
    """What the optimizer keeps for each parameter, from its first step on."""
    if optim.optimizer in ("adamw", "lamb"):
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} if optim.momentum or optim.optimizer == "lars" else set()


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
    return optim.final_lr + (optim.lr - optim.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Set the learning rate of every group that is not fixed."""
    for group in optimizer.param_groups:
        if not group.get("fixed_lr", False):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value
