"""The optimizer of a run and its parameter groups.

Each optimizer updates all parameters of a group in one launch and never waits for the device:
learning rates are tensors on it, and where the attribute `found_inf`, a 0-d float32 tensor, is 1
the step changes nothing, as in torch's fused optimizers. apex reads `found_inf` on the host, which
is the one wait.

torch's fused optimizers take weight decay as a number on the host, which a CUDA graph would keep
for good. A weight decay that changes is a tensor on the device too: LARS takes one, and for SGD and
AdamW, whose own decay is then 0, a hook before each step decays (`_decay`).
"""

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from rdm_fast.config import OptimConfig
from rdm_fast.optim.apex import build_apex_optimizer
from rdm_fast.optim.lars import Lars

PREDICTOR = "predictor."


def parameter_groups(method: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters, grouped by learning rate and weight decay.

    Args:
        method: a learned predictor is its attribute `predictor`.
        optim: says whether the predictor's learning rate is fixed, and whether some parameters are
            excluded from decay and LARS's adaptation: those of one dimension (norms, biases), and
            those that a module names in `no_weight_decay()`, as timm's models do (positional
            embeddings, class and register tokens).

    Returns:
        Up to four groups, each with `params`, `lr`, `weight_decay`, `fixed_lr` (ignored by
        `set_learning_rate`) and `adapt` (decayed, and scaled by LARS). The order of groups and
        parameters depends only on the architecture and `optim`.
    """
    named = _not_decayed(method)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (fixed_lr, excluded): [] for fixed_lr in (False, True) for excluded in (False, True)
    }
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            fixed_lr = optim.fixed_predictor_lr and name.startswith(PREDICTOR)
            excluded = not optim.decay_norm_and_bias and (
                parameter.dim() <= 1
                or name.endswith(".bias")
                or any(fnmatchcase(name, pattern) for pattern in named)
            )
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


def _not_decayed(method: nn.Module) -> list[str]:
    """Names of parameters, or patterns, by the methods `no_weight_decay` of a method's modules."""
    return [
        f"{path}.{name}" if path else name
        for path, module in method.named_modules()
        for name in getattr(module, "no_weight_decay", list)()
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
        if optim.weight_decay != optim.last_weight_decay and group["adapt"]:
            decay = torch.tensor(optim.weight_decay, dtype=torch.float32, device=device)
            own = {"decay": decay, "weight_decay": 0.0}
            group |= {"weight_decay": decay} if optim.optimizer == "lars" else own
    if optim.optimizer == "lars":
        eta, clip = optim.lars_eta, optim.lars_clip
        return Lars(groups, momentum=optim.momentum, trust_coefficient=eta, clip=clip)
    if optim.optimizer == "sgd":
        sgd = SGD(groups, momentum=optim.momentum, fused=True)
        if optim.momentum:
            for parameter in (p for group in groups for p in group["params"]):
                # otherwise uninitialized if the first step is skipped
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        sgd.register_step_pre_hook(_decay)
        return sgd
    adamw = AdamW(groups, fused=True, capturable=device.type == "cuda")
    adamw.register_step_pre_hook(_decay)
    return adamw


@torch.no_grad()
def _decay(optimizer: Optimizer, *_: object) -> None:
    """Decay the groups whose decay is a tensor: g <- g + wd p for SGD, p <- p - lr wd p for AdamW.

    A float32 factor 1 - lr wd would lose most digits of a small lr wd.
    """
    found_inf = getattr(optimizer, "found_inf", 0)
    for group in optimizer.param_groups:
        if "decay" in group:
            params = [p for p in group["params"] if p.grad is not None]
            if isinstance(optimizer, AdamW):
                decay = torch._foreach_mul(params, (found_inf - 1) * group["lr"] * group["decay"])
                torch._foreach_add_(params, decay)
            else:
                grads = [p.grad for p in params]
                torch._foreach_add_(grads, torch._foreach_mul(params, group["decay"]))


def state_keys(optim: OptimConfig) -> set[str]:
    """What the optimizer keeps for each parameter, from its first step on."""
    if optim.optimizer in ("adamw", "lamb"):
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} if optim.momentum or optim.optimizer == "lars" else set()
