"""Gradient clipping on the device, with the same formula for the whole gradient and its parts.

    g <- g min(1, c / (|g| + 1e-6))

With optim.clip_norm, g is the gradient of all parameters (torch's `clip_grad_norm_`); with
optim.clip_each, of each one (DINO's `clip_gradients`).
"""

import torch
from torch import Tensor

from rdm_fast.config import OptimConfig
from rdm_fast.optim.lars import scale_each

EPS = 1e-6


@torch.no_grad()
def clip_gradients(gradients: list[Tensor], norm: Tensor, optim: OptimConfig) -> None:
    """Clip gradients in place.

    Args:
        gradients: dense tensors on one device.
        norm: of all of them together, a scalar.
        optim: says which norm may be how large.
    """
    if optim.clip_norm:
        torch._foreach_mul_(gradients, _factor(optim.clip_norm, norm))
    if optim.clip_each:
        norms = torch.stack(torch._foreach_norm(gradients))
        scale_each(gradients, _factor(optim.clip_each, norms))


def _factor(limit: float, norm: Tensor) -> Tensor:
    return (limit / (norm + EPS)).clamp(max=1)
