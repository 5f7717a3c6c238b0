"""LARS (You et al., arXiv:1708.03888): SGD with momentum in which every layer has its own rate.

    r    = eta |p| / (|g| + wd |p| + eps),    clipped: min(r / lr, 1)
    d    = r (g + wd p),    but g where |p| or |g| is 0
    buf <- m buf + d,    p <- p - lr buf

as in RDM's released code (solo/utils/lars.py), solo-learn and NVIDIA apex's LARC. Excluded layers
(one-dimensional parameters: batch norms and biases) have r = 1 and wd = 0. timm's LARS also decays
a layer whose gradient is zero, and clips the rate of a layer that is zero; BYOL's own divides by
|g + wd p|.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lars(Optimizer):
    """SGD with momentum and layer-wise trust ratios (formula at the top of this file).

    Args:
        params: parameters, or groups of them; a group with `adapt=False` uses no trust ratio.
        lr: learning rate, 0 or more; a float, or a 0-d float32 tensor on the device.
        momentum: m.
        weight_decay: wd, in the trust ratio and in the step; a float or a tensor, as lr.
        trust_coefficient: eta.
        clip: cap a layer's rate at lr (LARC).
        eps: keeps the trust ratio finite.

    Its state is each parameter's `momentum_buffer`, as SGD's. No step waits for the device; where
    `found_inf`, a 0-d float32 tensor, is 1, a step changes nothing.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float | Tensor = 0.0,
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
        wd = group["weight_decay"]
        if isinstance(wd, Tensor):  # which alpha would read back
            d = torch._foreach_add(grads, torch._foreach_mul(params, wd))
        else:
            d = torch._foreach_add(grads, params, alpha=wd)
        if group["adapt"]:
            scale_each(d, _trust_ratios(group, params, grads))
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


def scale_each(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """tensors[i] *= factors[i] for dense tensors, in one launch; factors [N] on their device.

    On a GPU, foreach fuses only lists that agree in shapes and strides, and launches once per
    tensor for 0-d factors. So tensors are flattened, and each factor expanded to its length.
    """
    sizes = [tensor.numel() for tensor in tensors]
    flat = [tensor.as_strided((n,), (1,)) for tensor, n in zip(tensors, sizes, strict=True)]
    longer = [factor.expand(n) for factor, n in zip(factors.unbind(), sizes, strict=True)]
    torch._foreach_mul_(flat, torch.cat(longer).split(sizes))


def _trust_ratios(group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> Tensor:
    """d / (g + wd p) of every parameter, [N], on the device."""
    p_norm = torch.stack(torch._foreach_norm(params))
    g_norm = torch.stack(torch._foreach_norm(grads))
    scale = g_norm + group["weight_decay"] * p_norm + group["eps"]
    ratio = group["trust_coefficient"] * p_norm / scale
    if group["clip"]:
        ratio = (ratio / group["lr"]).clamp(max=1.0)
    ratio = ratio.where(p_norm > 0, 1.0)  # g + wd p is g
    return ratio.where(g_norm > 0, 0.0)  # g is 0
