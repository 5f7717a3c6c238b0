"""Heads: the projector after the backbone, and the learned predictor after the projector.

With L a linear layer, SimSiam (arXiv:2011.10566) and BYOL (arXiv:2006.07733) have

    projector, 3 layers   L - BN - ReLU - L - BN - ReLU - L [- BN without affine parameters]
    projector, 2 layers   L - BN - ReLU - L [- BN without affine parameters]
    predictor             L - BN - ReLU - L

SimSiam ends its projector with the batch norm in brackets, BYOL does not.
"""

from torch import nn

from rdm_fast.config import ModelConfig


def projector(model: ModelConfig, d_emb: int) -> nn.Sequential:
    """From embeddings [B, d_emb] to projections [B, D], D = model.projector_dim.

    Hidden layers have a bias in the two-layer projector (BYOL) and none in the three-layer one
    (SimSiam). A final batch norm cancels the last bias, which is then frozen.
    """
    bias = model.projector_layers == 2
    layers: list[nn.Module] = []
    width = d_emb
    for _ in range(model.projector_layers - 1):
        layers += _hidden(width, model.projector_hidden, bias)
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


def _hidden(inputs: int, outputs: int, bias: bool) -> list[nn.Module]:
    return [
        nn.Linear(inputs, outputs, bias=bias),
        nn.BatchNorm1d(outputs),
        nn.ReLU(inplace=True),
    ]
