"""BYOL's target weights: a moving average of the online weights, once per optimizer step.

    target <- tau target + (1 - tau) online
    tau     = tau_1 - (tau_1 - tau_0) (cos(pi k / K) + 1) / 2

(Grill et al., arXiv:2006.07733). Only parameters are averaged. The target network runs in training
mode and keeps its own batch-norm statistics, as in RDM's released code.
"""

import math

import torch
from torch import Tensor, nn


def ema_momentum(step: int, total_steps: int, start: float, end: float) -> float:
    """tau of one step: from `start` at step 0 to `end` at `total_steps`, on a cosine.

    Args:
        step: optimizer steps done before this one, k.
        total_steps: optimizer steps of the whole run, K.
        start: tau_0, such as 0.99.
        end: tau_1, such as 1.
    """
    return end - (end - start) * (math.cos(math.pi * step / total_steps) + 1) / 2


@torch.no_grad()
def update_ema(target: nn.Module, online: nn.Module, momentum: float | Tensor) -> None:
    """Move the target's parameters towards the online network's; buffers do not change.

    Args:
        target: changed in place, all its parameters at once.
        online: of the same architecture.
        momentum: tau; 1 keeps the target bit for bit. A 0-d float64 tensor stays on its device.

    Raises:
        ValueError: the two networks' parameters differ in number, shape or dtype.
    """
    slow: list[Tensor] = list(target.parameters())
    fast: list[Tensor] = list(online.parameters())
    if [(p.shape, p.dtype) for p in slow] != [(p.shape, p.dtype) for p in fast]:
        raise ValueError(
            "target and online network need the same architecture and dtypes, got "
            f"{_first_difference(slow, fast)}"
        )
    share = torch.as_tensor(1 - momentum, dtype=slow[0].dtype, device=slow[0].device)
    change = torch._foreach_sub(fast, slow)
    torch._foreach_mul_(change, share)
    torch._foreach_add_(slow, change)


def _first_difference(slow: list[Tensor], fast: list[Tensor]) -> str:
    for i, (p, q) in enumerate(zip(slow, fast, strict=False)):
        if (p.shape, p.dtype) != (q.shape, q.dtype):
            return f"{p.dtype} {[*p.shape]} and {q.dtype} {[*q.shape]} as parameter {i}"
    return f"{len(slow)} and {len(fast)} parameters"
