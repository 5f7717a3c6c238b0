"""Backbones: torchvision's ResNets with a stem for the image size, a ResNet-8 for CPUs, and timm's.

Models of timm are in `rdm_fast.models.timm_models`; all below is about the others.

The stems differ in their first convolution and in the max-pool after it:

    imagenet    7x7, stride 2, padding 3, then max-pool    224 -> 56
    cifar       3x3, stride 1, padding 1, no max-pool       32 -> 32
    cifar_pad2  3x3, stride 1, padding 2, no max-pool       32 -> 34, as in RDM's released code

cifar_no_relu is cifar without the ReLU after it, as in lightly's CIFAR examples.

Convolutions start Kaiming-normal, as in torchvision. Only the 3x3 stem of ResNet-18, 34 and 50
starts with torch's default, as in RDM's released code and solo-learn.

Module names are torchvision's, so weights can be exchanged with it unchanged.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18, resnet34, resnet50
from torchvision.models.resnet import BasicBlock

from rdm_fast.config import ModelConfig
from rdm_fast.models.timm_models import build_timm

AVX2_FLOATS = 8  # in a register
TORCHVISION = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}


def build_backbone(
    model: ModelConfig, channels: int, sizes: Sequence[int] = (224,)
) -> tuple[nn.Module, int]:
    """A randomly initialized backbone.

    Args:
        model: names the backbone and stem.
        channels: of the images, 1 or 3.
        sizes: sides of the views, in pixels, as in AugmentConfig. ResNets take any.

    Returns:
        The module, from views [B, channels, H, W] to embeddings [B, d_emb]; and d_emb.

    Raises:
        ValueError: model.stem does not exist for model.backbone.
        UsageError, Unavailable: as `build_timm`.
    """
    if model.timm_name:
        return build_timm(model, channels, sizes)
    if model.backbone == "resnet8":
        return _resnet8(model, channels), 4 * model.width
    backbone = TORCHVISION[model.backbone](
        weights=None, zero_init_residual=model.zero_init_residual
    )
    width = backbone.conv1.out_channels
    if model.stem != "imagenet":
        padding = 2 if model.stem == "cifar_pad2" else 1
        backbone.conv1 = nn.Conv2d(channels, width, 3, padding=padding, bias=False)
        backbone.maxpool = nn.Identity()
        if model.stem == "cifar_no_relu":
            backbone.relu = nn.Identity()  # blocks have their own
    elif channels != 3:
        backbone.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        _initialize_convolutions(backbone.conv1)
    d_emb = backbone.fc.in_features
    backbone.fc = nn.Identity()
    return backbone, d_emb


def memory_format(backbone: nn.Module) -> torch.memory_format:
    """The layout in which a backbone is fast: channels_last, if it has convolutions to speed up.

    Those of a ViT only cut out patches, one product each, so its weights stay as they are. Views
    are channels_last for all backbones.
    """
    convolutions = (m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    overlap = any(m.kernel_size != m.stride for m in convolutions)
    return torch.channels_last if overlap else torch.contiguous_format


def _resnet8(model: ModelConfig, channels: int) -> nn.Module:
    """One basic block a stage, of widths w, 2w and 4w at full, half and quarter size."""
    if model.stem != "cifar":
        raise ValueError(
            f"model.stem={model.stem} does not exist for model.backbone=resnet8: "
            "use model.stem=cifar, or a larger backbone such as resnet18"
        )
    w = model.width
    backbone = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, w, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(w),
            relu=nn.ReLU(inplace=True),
            layer1=_stage(w, w, stride=1),
            layer2=_stage(w, 2 * w, stride=2),
            layer3=_stage(2 * w, 4 * w, stride=2),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
        )
    )
    _initialize_convolutions(backbone)
    if model.zero_init_residual:
        for module in backbone.modules():
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
    return backbone


def _stage(inputs: int, outputs: int, stride: int) -> nn.Module:
    shortcut = None
    if inputs != outputs:
        convolution = Projection if inputs < AVX2_FLOATS else nn.Conv2d
        shortcut = nn.Sequential(
            convolution(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
        )
    return nn.Sequential(BasicBlock(inputs, outputs, stride, shortcut))


class Projection(nn.Conv2d):
    """A 1 x 1 convolution that subsamples before it multiplies.

    With a stride and fewer than AVX2_FLOATS input channels, oneDNN's own (torch 2.15, processors
    with AVX2 and no AVX-512) writes past the end of its memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        down, across = self.stride
        return F.conv2d(x[:, :, ::down, ::across], self.weight, self.bias)


def _initialize_convolutions(module: nn.Module) -> None:
    """Kaiming-normal by fan-out (He et al., arXiv:1502.01852), as in torchvision's ResNets."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
