"""Backbone and heads."""

from dataclasses import dataclass
from typing import Annotated, Literal

from rdm_fast.config.checks import Between, require, require_fields
from rdm_fast.config.flags import Alias

BackboneName = Literal["resnet8", "resnet18", "resnet34", "resnet50"]
Stem = Literal["imagenet", "cifar", "cifar_pad2", "cifar_no_relu"]

Width = Annotated[int, Between(1, 65_536)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Backbone and heads."""

    backbone: Annotated[BackboneName, Alias("--arch")] = "resnet18"
    """torchvision's ResNet-18, 34 or 50, or a small ResNet-8 for CPUs."""
    stem: Stem = "cifar"
    """First layers: imagenet (7x7, stride 2, max-pool), cifar (3x3), cifar_pad2 (RDM's code),
    cifar_no_relu (lightly's examples)."""
    width: Width = 24
    """Channels of the first stage of resnet8; the other backbones ignore it."""
    zero_init_residual: bool = False
    """Start every residual branch at zero."""
    projector_layers: Annotated[int, Between(2, 3)] = 3
    """Linear layers of the projector, 2 or 3."""
    projector_hidden: Width = 2048
    """Width of the projector's hidden layers."""
    projector_dim: Width = 2048
    """Width D of a projection."""
    projector_bn: bool = True
    """End the projector with a batch norm without affine parameters (SimSiam's, not BYOL's)."""
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
        require(
            self.backbone != "resnet8" or self.stem == "cifar",
            f"model.stem={self.stem} does not exist for model.backbone=resnet8: "
            "use model.stem=cifar, or a larger backbone such as resnet18",
        )
