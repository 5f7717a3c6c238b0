"""models.backbone against torchvision's own ResNets and the shapes of the paper's stems."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from rdm_fast.config import ModelConfig
from rdm_fast.models.backbone import Projection, build_backbone
from tests.spies import refused

CIFAR_CONV1 = ("conv1", "resnet18", "cifar_pad2")


def build(name: str, stem: str, channels: int = 1, **fields: object) -> tuple[nn.Module, int]:
    model = ModelConfig(backbone=name, stem=stem, **fields)  # type: ignore[arg-type]
    return build_backbone(model, channels)


@pytest.mark.parametrize(
    ("name", "d_emb"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)]
)
def test_weights_load_into_torchvision_and_give_the_same_embeddings(name: str, d_emb: int) -> None:
    ours, width = build(name, "imagenet", 3)
    with torch.device("meta"):  # so that no weights are drawn that are replaced
        theirs = getattr(torchvision.models, name)(weights=None)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    views = torch.randn(2, 3, 64, 64)
    embeddings = ours.eval()(views)
    assert embeddings.shape == (2, width) and width == d_emb
    assert torch.equal(embeddings, theirs.eval()(views))


@pytest.mark.parametrize(
    ("stem", "channels", "side", "map_side"),
    [
        ("imagenet", 1, 224, 56),
        ("cifar", 1, 32, 32),
        ("cifar", 3, 32, 32),
        ("cifar_pad2", 3, 32, 34),
    ],
)
def test_stems_change_only_conv1_and_give_maps_of_the_papers_size(
    stem: str, channels: int, side: int, map_side: int
) -> None:
    ours, _ = build("resnet18", stem, channels)
    weights = {key: w for key, w in ours.state_dict().items() if key != "conv1.weight"}
    result = torchvision.models.resnet18(weights=None).load_state_dict(weights, strict=False)
    assert set(result.missing_keys) == {"conv1.weight", "fc.weight", "fc.bias"}
    assert result.unexpected_keys == []
    assert ours.conv1.weight.shape[1:] == (channels, *((7, 7) if stem == "imagenet" else (3, 3)))
    sizes: list[torch.Size] = []
    ours.layer1.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    with torch.no_grad():
        assert ours.eval()(torch.randn(1, channels, side, side)).shape == (1, 512)
    assert sizes == [torch.Size((1, 64, map_side, map_side))]


@pytest.mark.parametrize(
    ("stem", "name"), [("cifar", "resnet8"), ("cifar_pad2", "resnet18"), ("imagenet", "resnet18")]
)
def test_every_convolution_starts_kaiming_normal_but_a_replaced_stem(stem: str, name: str) -> None:
    backbone, _ = build(name, stem)
    for path, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d) and (path, name, stem) != CIFAR_CONV1:
            n = module.weight.numel()
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            # the standard deviation of n normal draws is off by 1/sqrt(2n): allow five of those
            ratio = module.weight.std().item() / math.sqrt(2 / fan_out)
            assert abs(ratio - 1) < 5 / math.sqrt(2 * n), path
            assert module.bias is None


@pytest.mark.parametrize("stem", ["cifar", "cifar_pad2"])
@pytest.mark.parametrize(("name", "channels"), [("resnet18", 3), ("resnet50", 1)])
def test_a_replaced_3_x_3_stem_starts_as_torchs(name: str, channels: int, stem: str) -> None:
    """nn.Conv2d's default, kept by RDM and solo-learn, is uniform within 1/sqrt(fan_in)."""
    backbone, _ = build(name, stem, channels)
    w = backbone.conv1.weight.detach()  # type: ignore[union-attr, operator]
    bound = 1 / math.sqrt(channels * 9)  # 0.192 for color
    assert w.abs().max() <= bound and w.abs().max() > 0.98 * bound
    # the variance of n uniform draws is off by sqrt(4/5n): allow five of those
    expected = bound / math.sqrt(3)  # 0.111 for color, where Kaiming-normal has 0.059
    assert abs(w.square().mean().item() / expected**2 - 1) < 5 * math.sqrt(0.8 / w.numel())


def test_an_imagenet_backbone_starts_with_torchvisions_weights() -> None:
    torch.manual_seed(3)
    ours, _ = build("resnet18", "imagenet", 3)
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    assert all(torch.equal(weight, theirs[key]) for key, weight in ours.state_dict().items())


def test_resnet8_has_one_block_a_stage_at_full_half_and_quarter_size() -> None:
    backbone, d_emb = build("resnet8", "cifar", width=6)
    shapes = []
    for name in ("layer1", "layer2", "layer3"):
        stage = backbone.get_submodule(name)
        stage.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
        assert len(list(stage.children())) == 1
    embeddings = backbone(torch.randn(2, 1, 16, 16))
    assert shapes == [(6, 16, 16), (12, 8, 8), (24, 4, 4)]
    assert d_emb == 24 and embeddings.shape == (2, 24)
    # stem, two convolutions in each of three blocks; shortcuts are not counted in ResNet names
    named = [n for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d)]
    assert len([n for n in named if "downsample" not in n]) == 7


def test_a_narrow_resnet8_differs_only_in_when_its_shortcuts_subsample() -> None:
    backbone, _ = build("resnet8", "cifar", width=3)
    narrow = [m for m in backbone.modules() if isinstance(m, Projection)]
    assert [m.in_channels for m in narrow] == [3, 6]
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    plain = nn.Conv2d(3, 6, 1, stride=2, bias=False).double()
    narrow[0].double().load_state_dict(plain.state_dict())
    torch.testing.assert_close(narrow[0](x), plain(x))
    wide, _ = build("resnet8", "cifar", width=8)
    assert not any(isinstance(m, Projection) for m in wide.modules())


TRAIN_A_NARROW_ONE = """
import torch
from rdm_fast.models.backbone import build_backbone
from rdm_fast.config import ModelConfig
backbone, _ = build_backbone(ModelConfig(backbone="resnet8", stem="cifar", width=4), channels=1)
backbone = backbone.to(memory_format=torch.channels_last)
for _ in range(30):
    views = torch.randn(4, 1, 16, 16).to(memory_format=torch.channels_last)
    backbone(views).square().sum().backward()
print("whole")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's checks of the heap")
def test_training_a_narrow_resnet8_stays_in_its_memory() -> None:
    """As on a processor without AVX-512, whatever this one is."""
    checked = {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "17", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_A_NARROW_ONE],
        env={**os.environ, **checked}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "whole\n", done.stderr


@pytest.mark.parametrize(
    ("name", "stem", "blocks"), [("resnet8", "cifar", 3), ("resnet18", "cifar_pad2", 8)]
)
@pytest.mark.parametrize("zero", [True, False])
def test_zero_init_residual_starts_at_zero(name: str, stem: str, blocks: int, zero: bool) -> None:
    backbone, _ = build(name, stem, zero_init_residual=zero)
    last = [w for key, w in backbone.named_parameters() if key.endswith("bn2.weight")]
    assert len(last) == blocks
    assert all(torch.equal(w, torch.full_like(w, 0.0 if zero else 1.0)) for w in last)


@pytest.mark.parametrize("stem", ["imagenet", "cifar_pad2"])
def test_resnet8_has_no_other_stem(stem: str) -> None:
    with refused(ValueError, f"model.stem={stem}"):
        build("resnet8", stem)
