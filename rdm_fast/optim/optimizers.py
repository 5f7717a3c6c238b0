"""The optimizer of a run, its parameter groups, and the learning rate of every step.

Every optimizer here updates all parameters of a group in one launch and never waits for the device:
learning rates are tensors on it, and where the attribute `found_inf`, a 0-d float32 tensor, is
1 the step changes nothing, as torch's fused optimizers have it for gradient scaling. apex's cannot
be told so: theirs is the one wait.
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
    """The trainable parameters, grouped by how they are treated.

    Args:
        method: its learned predictor, if any, is its attribute `predictor`.
        optim: decides whether the predictor's learning rate is fixed and whether
            one-dimensional parameters are excluded from decay and LARS's adaptation.

    Returns:
        Up to four groups, each with `params`, `lr`, `weight_decay`, `fixed_lr` (left alone by
        `set_learning_rate`) and `adapt` (scaled by LARS). Their order, and that of the
        parameters in them, depends on the architecture and `optim` only.
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

    Its learning rates are 0-d tensors on the device (numbers, for apex); it steps where `found_inf`
    is not 1.

    Raises:
        Unavailable: optim.backend=apex, and no apex that can be used.
    """
    groups = parameter_groups(method, optim)
    if optim.backend == "apex":
        return build_apex_optimizer(groups, optim, device)
    for group in groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
    if optim.optimizer == "lars":
        return Lars(
            groups,
            lr=optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            trust_coefficient=optim.lars_eta,
            clip=optim.lars_clip,
        )
    if optim.optimizer == "sgd":
        sgd = SGD(groups, momentum=optim.momentum, fused=True)
        if optim.momentum:
            for parameter in (p for group in groups for p in group["params"]):
                # torch would leave it uninitialized if the first step is one that changes nothing
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return AdamW(groups, fused=True)


def learning_rate(step: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """The learning rate of one optimizer step.

    Args:
        step: optimizer steps done before this one, from 0 to epochs * steps_per_epoch - 1.
        steps_per_epoch: optimizer steps in one pass over the data.
        optim: peak, length and ends of the schedule.

    Returns:
        warmup_lr at step 0, rising linearly to optim.lr over warmup_epochs; from there half a
        cosine, which would reach final_lr at the step after the last (Loshchilov & Hutter,
        arXiv:1608.03983), so that no step is spent at a rate of zero.
    """
    warmup = optim.warmup_epochs * steps_per_epoch
    if step < warmup:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup
    progress = (step - warmup) / (optim.epochs * steps_per_epoch - warmup)
    return optim.final_lr + (optim.lr - optim.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Give every group of `build_optimizer` this learning rate, but those that are fixed."""
    for group in optimizer.param_groups:
        if not group.get("fixed_lr", False):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value
