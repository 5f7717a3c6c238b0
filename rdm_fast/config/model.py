"""Backbone and heads."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from rdm_fast.config.checks import Between, require, require_fields
from rdm_fast.config.flags import Alias

RESNETS = ("resnet8", "resnet18", "resnet34", "resnet50")
TIMM = "timm/"
"""Begins the name of a model of timm, which timm itself checks when it builds it."""
Stem = Literal["imagenet", "cifar", "cifar_pad2", "cifar_no_relu"]

Width = Annotated[int, Between(1, 65_536)]
PatchSize = Annotated[int, Between(0, 1024)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Backbone and heads."""

    backbone: Annotated[str, Alias("--arch")] = "resnet18"
    """resnet18, resnet34 or resnet50 of torchvision, resnet8 (small, for CPUs), or timm/NAME: any
    model of timm that gives embeddings, such as timm/vit_tiny_patch16_224."""
    stem: Stem = "cifar"
    """First layers of a ResNet: imagenet (7x7, stride 2, max-pool), cifar (3x3), cifar_pad2 (RDM's
    code), cifar_no_relu (lightly's examples). Models of timm have their own."""
    patch_size: PatchSize = 0
    """Side of a patch in pixels, for models of timm that take one; 0 for the model's own."""
    frozen_patch: bool = False
    """Keep the patch projection of a ViT as it was drawn, which steadies its training (MoCo v3)."""
    width: Width = 24
    """Channels of the first stage of resnet8; the other backbones ignore it."""
    zero_init_residual: bool = False
    """Start every residual branch of a ResNet at zero; models of timm start as timm has them."""
    projector_layers: Annotated[int, Between(2, 3)] = 3
    """Linear layers of the projector, 2 or 3."""
    projector_hidden: Width = 2048
    """Width of the projector's hidden layers."""
    projector_dim: Width = 2048
    """Width D of a projection."""
    projector_bn: bool = True
    """End the projector with a batch norm without affine parameters (SimSiam's, not BYOL's)."""
    projector_activation: Literal["relu", "gelu"] = "relu"
    """Activation of the projector's hidden layers; gelu is DINO's."""
    projector_hidden_bn: bool = True
    """Batch norm in the projector's hidden layers, which DINO's has not."""
    predictor_hidden: Width = 512
    """Hidden width of the learned predictor."""
    init: Annotated[str, Alias("--init")] = ""
    """Weights file whose backbone the run starts from (warm start), from this or another trainer;
    empty for random weights. A resumed run does not read it again."""
    init_prefix: Annotated[str, Alias("--prefix")] = ""
    """Prefix of the backbone's tensor names in that file; empty to find it."""

    def __post_init__(self) -> None:
        require_fields("model.", self)
        require(
            not self.init_prefix or bool(self.init),
            "model.init_prefix is for a file of weights: give model.init too, or leave it out",
        )
        check_backbone("model.backbone", self.backbone)
        for name, meant, default in (
            ("stem", not self.timm_name, "cifar"),
            ("patch_size", self.timm_name, 0),
            ("frozen_patch", self.timm_name, False),
        ):
            require(
                meant or getattr(self, name) == default,
                f"model.{name}={getattr(self, name)} means nothing for model.backbone="
                f"{self.backbone}: give model.{name}={default}, the default",
            )
        require(
            self.backbone != "resnet8" or self.stem == "cifar",
            f"model.stem={self.stem} does not exist for model.backbone=resnet8: "
            "use model.stem=cifar, or a larger backbone such as resnet18",
        )

    @property
    def timm_name(self) -> str:
        """The backbone's name in timm; empty for a ResNet of this project."""
        return self.backbone.removeprefix(TIMM) if self.backbone.startswith(TIMM) else ""


def check_backbone(flag: str, name: str) -> None:
    """Check the form of a backbone's name; whether timm has it, only timm knows.

    Args:
        flag: names the backbone.
        name: the backbone.

    Raises:
        UsageError: it is neither one of RESNETS nor timm/NAME.
    """
    model, _, tag = name.removeprefix(TIMM).partition(".")
    require(
        not (name.startswith(TIMM) and tag),
        f"{flag}={name}: .{tag} names pretrained weights, which a backbone does not begin with: "
        f"give {TIMM}{model}",
    )
    require(
        name in RESNETS or (name.startswith(TIMM) and re.fullmatch("[A-Za-z0-9_]+", model)),
        f"{flag}={name!r} is unknown: use one of {', '.join(RESNETS)}, or {TIMM}NAME for a model "
        "of timm",
    )
