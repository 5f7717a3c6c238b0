"""models.pretrained_timm: timm's models from files of timm, of other trainers and of runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rdm_fast.config import Config, ModelConfig
from rdm_fast.errors import DataError
from rdm_fast.methods import build_method
from rdm_fast.models.backbone import build_backbone
from rdm_fast.models.pretrained import METADATA, file_note, load_backbone, read_backbone, warm_start
from rdm_fast.models.pretrained_timm import PretrainedTimm
from tests.spies import refused
from tests.tiny import tiny

VIT = ModelConfig(backbone="timm/test_vit", patch_size=8)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
State = dict[str, Tensor]


def plain(name: str = "test_vit", **arguments: Any) -> nn.Module:
    """A model of timm with its classifier, as timm's users save it."""
    size = {"img_size": 32, "patch_size": 8} if "vit" in name else {}
    return timm.create_model(name, num_classes=10, **size | arguments).eval()


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def embeddings(model: nn.Module) -> Tensor:
    """Those of a model of timm, before its classifier."""
    with torch.no_grad():
        return model.forward_head(model.forward_features(IMAGES), pre_logits=True)  # type: ignore[operator]


def read(file: Path, arch: str = VIT.backbone, prefix: str | None = None) -> PretrainedTimm:
    found = read_backbone(file, prefix, arch)
    assert isinstance(found, PretrainedTimm)
    return found


@pytest.mark.parametrize(
    ("table", "prefix", "asked"),
    [
        ("", "", None),  # timm's own
        ("state_dict", "module.base_encoder.", None),  # MoCo v3
        ("teacher", "backbone.", None),  # DINO
        ("model", "_orig_mod.", None),
        ("", "trunk.blocks.", "trunk.blocks."),
    ],
)
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_model_is_found_by_its_names_and_its_classifier_is_counted(
    name: str, table: str, prefix: str, asked: str | None, tmp_path: Path
) -> None:
    model = plain(name)
    state = under(prefix, dict(model.state_dict())) | {"projector.0.weight": torch.ones(3)}
    file = tmp_path / "x.pth"
    torch.save({table: state, "epoch": 3} if table else state, file)
    arch = f"timm/{name}"
    found = read(file, arch, asked)
    found.require(built := ModelConfig(**found.settings), 3, (32,))
    backbone, _ = build_backbone(built, 3, (32,))
    said = found.load_into(backbone)
    count = len(backbone.state_dict())
    assert f"loaded {count} of {count}" in said and "projector 1" in said and "head 2" in said
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval()(IMAGES), embeddings(model), atol=1e-6, rtol=0)


def test_a_file_of_this_project_needs_no_words(tmp_path: Path) -> None:
    config = replace(Config(model=VIT), augment=replace(Config().augment, size=32))
    backbone, _ = build_backbone(VIT, 3, (32,))
    file = tmp_path / "x.safetensors"
    save_file(under("backbone.", dict(backbone.state_dict())), file, file_note(config))
    loaded = load_backbone(file)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), backbone.eval()(IMAGES))


# ---- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "images", "named"),
    [
        ({"patch_size": 4}, (3, (32,)), "--patch-size 8"),
        ({}, (1, (32,)), "3 channel(s)"),
        ({}, (3, (64,)), "32 pixels"),
        ({"backbone": "timm/test_vit2"}, (3, (32,)), "timm/test_vit2"),
        ({"backbone": "timm/test_resnet", "patch_size": 0}, (3, (32,)), "--arch"),
    ],
)
def test_a_file_of_another_model_is_one_sentence(
    asked: dict[str, Any], images: tuple[int, tuple[int, ...]], named: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.pth"
    torch.save(plain().state_dict(), file)
    model = replace(VIT, **asked)
    with refused(DataError, str(file), named):
        read(file, model.backbone).require(model, *images)


def test_a_deeper_file_is_not_cut(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    state = dict(plain().state_dict())
    torch.save(state | {"blocks.6.norm1.weight": state["blocks.0.norm1.weight"]}, file)
    with refused(DataError, "1 unknown (blocks.6.norm1.weight)"):
        read(file).require(VIT, 3, (32,))


def test_without_a_name_a_vit_asks_for_arch(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save(plain().state_dict(), file)
    with refused(DataError, str(file), "--arch timm/NAME"):
        read_backbone(file)


@pytest.mark.parametrize(
    ("note", "named"),
    [
        ({"backbone": "timm/vit; rm", "patch_size": 8, "input_size": [3, 32, 32]}, "backbone"),
        ({"backbone": "timm/test_vit", "input_size": [3, 32, 32]}, "patch_size"),
        ({"backbone": "timm/test_vit", "patch_size": 8}, "input_size"),
        ({"backbone": "timm/test_vit", "patch_size": 8, "input_size": [3, -1, 32]}, "input_size"),
        (  # a model of a gigabyte with embeddings for a billion patches is never allocated
            {"backbone": "timm/vit_large_patch16_224", "patch_size": 1,
             "input_size": [3, 16384, 16384]},
            "no tensor of this model",
        ),
        ({"backbone": "timm/test_vit2", "patch_size": 8, "input_size": [3, 32, 32]}, "match"),
    ],
)  # fmt: skip
def test_a_wrong_note_is_a_data_error(note: dict[str, Any], named: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(dict(plain().state_dict()), file, {METADATA: json.dumps(note)})
    with refused(DataError, str(file), named):
        load_backbone(file)


# ---- warm start ------------------------------------------------------------------------------


def start(file: Path, recipe: str = "digits_byol", **model: Any) -> Config:
    config = tiny(recipe, size=32)
    return replace(config, model=replace(config.model, **model, init=str(file)))


@pytest.mark.parametrize("noted", [False, True])
def test_a_warm_start_fills_the_backbone_and_the_target(noted: bool, tmp_path: Path) -> None:
    model = plain(in_chans=1)
    file = tmp_path / "x.safetensors"
    settings = {"backbone": VIT.backbone, "patch_size": 8}
    config = start(file, **settings)
    save_file(dict(model.state_dict()), file, file_note(config) if noted else None)
    method = build_method(config)
    warm_start(method, config)
    for part in (method.backbone, method.target_backbone):
        for name, tensor in part.state_dict().items():  # type: ignore[union-attr]
            assert torch.equal(tensor, model.state_dict()[name])
    if noted:
        resnet = start(file, backbone="resnet8")
        with refused(DataError, "--arch timm/test_vit"):
            warm_start(build_method(resnet), resnet)
