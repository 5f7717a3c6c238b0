"""rdm_fast.optim.layers and the groups without decay, against timm's own functions."""

import pytest
import timm
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from rdm_fast.config import ModelConfig, OptimConfig
from rdm_fast.errors import UsageError
from rdm_fast.models.backbone import build_backbone
from rdm_fast.optim import layer_decay_groups, parameter_groups

VIT = {"img_size": 16, "patch_size": 4, "in_chans": 1}
MODELS = {
    "test_vit": VIT,
    "vit_tiny_patch16_224": VIT | {"depth": 3, "reg_tokens": 2},
    "test_convnext": {},
    "test_resnet": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_rates_of_layers_are_timms(name: str) -> None:
    """timm's of the same model with a classifier, which is our head."""
    backbone = timm.create_model(name, num_classes=0, **MODELS[name])
    whole = timm.create_model(name, num_classes=10, **MODELS[name])
    head = nn.Linear(4, 10)
    ours = {
        id(p): group["lr_scale"]
        for group in layer_decay_groups(backbone, head, 0.65)
        for p in group["params"]
    }
    theirs = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(whole, layer_decay=0.65)
        for p in group["params"]
    }
    twin = dict(whole.named_parameters())
    assert {ours[id(p)] for p in head.parameters()} == {1.0}
    assert len(ours) == len(theirs) and len(set(ours.values())) > 2
    for path, p in backbone.named_parameters():
        assert ours[id(p)] == pytest.approx(theirs[id(twin[path])], rel=1e-15), path


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_the_layers_of_a_resnet_are_its_stages(name: str) -> None:
    backbone, width = build_backbone(ModelConfig(backbone=name, width=8), 3, [32])
    head = nn.Linear(width, 10)
    groups = layer_decay_groups(backbone, head, 0.5)
    stages = 3 if name == "resnet8" else 4
    assert [group["lr_scale"] for group in groups] == [0.5**i for i in range(stages + 1, -1, -1)]
    layer = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    if name == "resnet18":  # as timm has them, coarse
        matcher = timm.create_model(name, num_classes=0).group_matcher(coarse=True)
        expected = group_parameters(backbone, matcher, reverse=True)
        assert {path: layer[id(p)] for path, p in backbone.named_parameters()} == expected
    assert {layer[id(p)] for p in head.parameters()} == {stages + 1}


def test_a_backbone_without_layers_has_one_rate_or_none() -> None:
    backbone, head = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Linear(4, 2)
    groups = layer_decay_groups(backbone, head, 1.0)
    assert {group["lr_scale"] for group in groups} == {1.0}
    assert sum(len(group["params"]) for group in groups) == 6
    with pytest.raises(UsageError, match="--layer-decay"):
        layer_decay_groups(backbone, head, 0.5)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_decayed_is_what_timm_does_not_decay(name: str) -> None:
    method = nn.Module()
    method.backbone = timm.create_model(name, num_classes=0, **MODELS[name])
    method.projector = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    theirs = [
        group
        for model in (method.backbone, method.projector)
        for group in param_groups_weight_decay(
            model, 0.1, no_weight_decay_list=getattr(model, "no_weight_decay", tuple)()
        )
    ]
    ours = parameter_groups(method, OptimConfig(weight_decay=0.1, decay_norm_and_bias=False))
    found, expected = (
        {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        for groups in (ours, theirs)
    )
    assert found == expected and set(found.values()) == {0.0, 0.1}
    if "vit" in name:
        tokens = {path for path, p in method.backbone.named_parameters() if p.dim() > 1}
        kept = {path for path in tokens if found[id(method.backbone.get_parameter(path))] == 0}
        registers = {"reg_token"} if "tiny" in name else set()
        assert kept == {"pos_embed", "cls_token"} | registers
    for group in parameter_groups(method, OptimConfig(weight_decay=0.1)):
        assert group["weight_decay"] == 0.1
