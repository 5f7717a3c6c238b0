"""heads against the layer lists of SimSiam and BYOL (table of the module's docstring)."""

import pytest
import torch
from torch import nn

from rdm_fast.config import ModelConfig
from rdm_fast.models.heads import mlp_predictor, projector

Layer = tuple[object, ...]


def layers(head: nn.Sequential) -> list[Layer]:
    """The layers of a head: (L, in, out, bias, trainable bias), (BN, width, affine), (ReLU,)."""
    found: list[Layer] = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            has = layer.bias is not None
            trained = has and layer.bias.requires_grad
            found.append(("L", layer.in_features, layer.out_features, has, trained))
        elif isinstance(layer, nn.BatchNorm1d):
            found.append(("BN", layer.num_features, layer.affine))
        else:
            found.append((type(layer).__name__,))
    return found


def model(layers: int, bn: bool) -> ModelConfig:
    return ModelConfig(
        projector_layers=layers, projector_hidden=7, projector_dim=5, projector_bn=bn
    )


HIDDEN = [("BN", 7, True), ("ReLU",)]
SIMSIAM = [
    *[("L", 3, 7, False, False), *HIDDEN],
    *[("L", 7, 7, False, False), *HIDDEN],
    *[("L", 7, 5, True, False), ("BN", 5, False)],
]
BYOL = [("L", 3, 7, True, True), *HIDDEN, ("L", 7, 5, True, True)]


@pytest.mark.parametrize(
    ("depth", "bn", "expected"),
    [
        (3, True, SIMSIAM),
        (3, False, [*SIMSIAM[:6], ("L", 7, 5, True, True)]),
        (2, False, BYOL),
        (2, True, [*BYOL[:3], ("L", 7, 5, True, False), ("BN", 5, False)]),
    ],
    ids=["SimSiam", "SimSiam without final BN", "BYOL", "BYOL with final BN"],
)
def test_projector_has_the_papers_layers(depth: int, bn: bool, expected: list[Layer]) -> None:
    assert layers(projector(model(depth, bn), 3)) == expected


@pytest.mark.parametrize("bias", [True, False])
def test_predictor_has_the_papers_layers(bias: bool) -> None:
    expected = [("L", 5, 7, bias, bias), *HIDDEN, ("L", 7, 5, True, True)]
    assert layers(mlp_predictor(5, 7, bias)) == expected


@pytest.mark.parametrize("depth", [2, 3])
def test_final_batch_norm_standardizes_every_direction(depth: int) -> None:
    z = projector(model(depth, True), 3)(torch.randn(64, 3))
    # the 1e-5 that batch norm adds to a variance keeps the result's below 1
    torch.testing.assert_close(z.mean(0), torch.zeros(5), atol=1e-6, rtol=0)
    assert (z.var(0, correction=0) <= 1 + 1e-6).all()
    assert (z.var(0, correction=0) > 0.99).all()


def test_frozen_bias_is_the_one_the_batch_norm_takes_away() -> None:
    head = projector(model(3, True), 3)
    frozen = [name for name, p in head.named_parameters() if not p.requires_grad]
    assert frozen == ["6.bias"]
    x = torch.randn(16, 3)
    before = head(x)
    with torch.no_grad():
        head[6].bias += 1.0
    # a shift by 1 of values below 2 rounds them by 1e-7, which the batch norm scales up
    torch.testing.assert_close(head(x), before, atol=1e-5, rtol=0)
