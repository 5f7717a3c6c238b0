"""Heads: the projector after the backbone, and the learned predictor after the projector.

With L a linear layer, SimSiam (arXiv:2011.10566) and BYOL (arXiv:2006.07733) have

    projector, 3 layers   L - BN - ReLU - L - BN - ReLU - L [- BN without affine parameters]
    projector, 2 layers   L - BN - ReLU - L [- BN without affine parameters]
    predictor             L - BN - ReLU - L

DINO's projector (arXiv:2104.14294) has GELU for BN - ReLU.

SimSiam ends its projector with the batch norm in brackets, BYOL does not.
"""

from torch import nn

from rdm_fast.config import ModelConfig


def projector(model: ModelConfig, d_emb: int) -> nn.Sequential:
    """From embeddings [B, d_emb] to projections [B, D], D = model.projector_dim.

    Hidden layers have a bias in the two-layer projector (BYOL) and none in the three-layer one
    (SimSiam), unless it lacks their batch norm. A final batch norm cancels the last bias, which is
    then frozen.
    """
    norm, gelu = model.projector_hidden_bn, model.projector_activation == "gelu"
    bias = model.projector_layers == 2 or not norm
    layers: list[nn.Module] = []
    width = d_emb
    for _ in range(model.projector_layers - 1):
        layers += _hidden(width, model.projector_hidden, bias, norm=norm, gelu=gelu)
        width = model.projector_hidden
    last = nn.Linear(width, model.projector_dim)
    layers.append(last)
    if model.projector_bn:
        last.bias.requires_grad_(False)
        layers.append(nn.BatchNorm1d(model.projector_dim, affine=False))
    return nn.Sequential(*layers)


def mlp_predictor(D: int, hidden: int, bias: bool) -> nn.Sequential:
    """The learned predictor, from projections [B, D] to predictions [B, D].

    Args:
        D: width of a projection.
        hidden: width of the hidden layer.
        bias: whether the hidden layer has one, though its batch norm cancels it: True in BYOL,
            False in SimSiam.
    """
    return nn.Sequential(*_hidden(D, hidden, bias), nn.Linear(hidden, D))


def draw_like_dino(head: nn.Module) -> None:
    """Draw every linear layer's weight from a normal of deviation 0.02, and set its bias to 0."""
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _hidden(
    inputs: int, outputs: int, bias: bool, *, norm: bool = True, gelu: bool = False
) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Linear(inputs, outputs, bias=bias)]
    layers += [nn.BatchNorm1d(outputs)] * norm
    return [*layers, nn.GELU() if gelu else nn.ReLU(inplace=True)]
