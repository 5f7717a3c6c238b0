"""Optimizers, their parameter groups, and the learning rate of every step.

LARS (You et al., arXiv:1708.03888) is SGD with momentum in which every layer has its own rate,

    r    = eta |p| / (|g| + wd |p| + eps),    1 where |p| or |g| is 0;    clipped: min(r / lr, 1)
    d    = r (g + wd p)
    buf <- m buf + d,    p <- p - lr buf

as in RDM's released code. Layers that are excluded (one-dimensional parameters: batch norms and
biases) take r = 1 and wd = 0.

Every optimizer here updates all parameters of a group in one launch and never waits for the device:
learning rates are tensors on it, and where the attribute `found_inf`, a 0-d float32 tensor, is
1 the step changes nothing, as torch's fused optimizers have it for gradient scaling.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from rdm_fast.config import OptimConfig

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

    Its learning rates are 0-d tensors on the device; it steps where `found_inf` is not 1.
    """
    groups = parameter_groups(method, optim)
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
                # torch would leave it uninitialised if the first step is one that changes nothing
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
            group["lr"].fill_(value)


class Lars(Optimizer):
    """SGD with momentum and layer-wise trust ratios (formula at the top of this file).

    Args:
        params: parameters, or groups of them; a group with `adapt=False` takes no trust ratio.
        lr: learning rate, 0 or more; a float, or a 0-d float32 tensor on the device.
        momentum: m.
        weight_decay: wd, in the trust ratio and in the step.
        trust_coefficient: eta.
        clip: never let a layer's rate exceed lr (LARC).
        eps: keeps the trust ratio finite.

    State: `momentum_buffer` of every parameter, as SGD's. No step waits for the device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.02,
        clip: bool = True,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "clip": clip,
            "eps": eps,
            "adapt": True,
        }
        super().__init__(params, defaults)
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params, [p.grad for p in params])
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        d = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(d, _trust_ratios(group, params, grads))
        buffers = [self._momentum_buffer(p) for p in params]
        torch._fused_sgd_(  # the last line of the formula
            params,
            d,
            buffers,
            weight_decay=0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=self.found_inf,
        )

    def _momentum_buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def _trust_ratios(
    group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
) -> tuple[Tensor, ...]:
    """r of every parameter, each 0-d and on the device."""
    p_norm = torch.stack(torch._foreach_norm(params))
    g_norm = torch.stack(torch._foreach_norm(grads))
    scale = g_norm + group["weight_decay"] * p_norm + group["eps"]
    ratio = group["trust_coefficient"] * p_norm / scale
    ratio = ratio.where((p_norm > 0) & (g_norm > 0), 1.0)
    if group["clip"]:
        ratio = (ratio / group["lr"]).clamp(max=1.0)
    return ratio.unbind()
