"""heads against the layer lists of SimSiam and BYOL (table of the module's docstring)."""

import pytest
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
            assert layer.eps == 1e-5  # so it standardizes, and takes the frozen bias away
            found.append(("BN", layer.num_features, layer.affine))
        else:
            found.append((type(layer).__name__,))
    return found


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
    sizes = {"projector_layers": depth, "projector_hidden": 7, "projector_dim": 5}
    assert layers(projector(ModelConfig(**sizes, projector_bn=bn), 3)) == expected


@pytest.mark.parametrize("bias", [True, False])
def test_predictor_has_the_papers_layers(bias: bool) -> None:
    expected = [("L", 5, 7, bias, bias), *HIDDEN, ("L", 7, 5, True, True)]
    assert layers(mlp_predictor(5, 7, bias)) == expected
