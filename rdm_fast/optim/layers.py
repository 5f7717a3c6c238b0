"""Layer-wise learning rates for fine-tuning (BEiT, arXiv:2106.08254): deep layers move less."""

import re
from types import SimpleNamespace
from typing import Any

from torch import nn

from rdm_fast.errors import UsageError

HEAD = "head"
"""Name of the new layer, which no layer of a backbone has."""


def layer_decay_groups(backbone: nn.Module, head: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Parameters by layer, from the stem to the head.

    Args:
        backbone: a model of timm, in layers as timm has it (a ViT's are its blocks), or a ResNet,
            whose layers are its stages.
        head: the new layer on top of it.
        decay: factor from one layer to the one below.

    Returns:
        Groups with `params` and `lr_scale`: decay^(L - i) in layer i, where the head is layer L.

    Raises:
        UsageError: decay is not 1, and the backbone has no layers.
    """
    layers = _layers(backbone)
    top = layers[HEAD]
    if decay != 1 and top < 2:
        raise UsageError("--layer-decay: this backbone has no layers: leave it out")
    groups: list[dict[str, Any]] = [
        {"params": [], "lr_scale": decay ** (top - i)} for i in range(top + 1)
    ]
    for name, parameter in backbone.named_parameters():
        groups[layers[name]]["params"].append(parameter)
    groups[top]["params"].extend(head.parameters())
    return [group for group in groups if group["params"]]


def _layers(backbone: nn.Module) -> dict[str, int]:
    """The layer of each parameter of the backbone, and of HEAD, by name, from 0."""
    names = [name for name, _ in backbone.named_parameters()]
    if hasattr(backbone, "group_matcher"):
        from timm.models import group_parameters

        named = [(name, None) for name in (*names, HEAD)]
        whole: Any = SimpleNamespace(named_parameters=lambda: named)
        matcher: Any = backbone.group_matcher(coarse=False)  # type: ignore[operator]
        found: dict[str, int] = group_parameters(whole, matcher, reverse=True)
        return found
    stages = {name: re.match(r"layer(\d+)\.", name) for name in names}
    layers = {name: int(stage[1]) if stage else 0 for name, stage in stages.items()}
    return layers | {HEAD: max(layers.values()) + 1}
