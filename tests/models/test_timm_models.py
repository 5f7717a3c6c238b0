"""models.timm_models: timm's models at the images and patches of a run."""

import sys
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from rdm_fast.config import ModelConfig
from rdm_fast.errors import Unavailable, UsageError
from rdm_fast.models.backbone import build_backbone, memory_format
from rdm_fast.models.batchnorm import CpuSyncBatchNorm, synchronize
from tests.spies import refused

TINY = "timm/test_vit"


def build(name: str, sizes: tuple[int, ...] = (32,), channels: int = 3, **model: Any) -> nn.Module:
    torch.manual_seed(5)
    return build_backbone(ModelConfig(backbone=name, **model), channels, sizes)[0]


@pytest.mark.parametrize(
    ("name", "channels", "size", "model", "arguments"),
    [
        ("vit_tiny_patch16_224", 1, 32, {"patch_size": 4}, {"img_size": 32, "patch_size": 4}),
        ("test_vit", 3, 48, {}, {"img_size": 48}),
        pytest.param("vit_small_patch16_224", 3, 224, {}, {}, marks=pytest.mark.slow),
        ("convnext_atto", 3, 64, {}, {}),
        ("test_convnext", 1, 32, {"patch_size": 2}, {"patch_size": 2}),
        ("resnet18", 3, 64, {}, {}),
    ],
)
def test_a_model_is_timms_own_with_equal_weights_for_equal_seeds(
    name: str, channels: int, size: int, model: dict[str, Any], arguments: dict[str, Any]
) -> None:
    ours = build(f"timm/{name}", (size, size), channels, **model)
    torch.manual_seed(5)
    theirs = timm.create_model(name, num_classes=0, in_chans=channels, **arguments)
    state = theirs.state_dict()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {
        n: t.shape for n, t in state.items()
    }
    assert all(torch.equal(t, state[n]) for n, t in ours.state_dict().items())
    images = torch.randn(2, channels, size, size)
    with torch.no_grad():
        embeddings = ours.eval()(images)
        assert torch.equal(embeddings, theirs.eval()(images))
    d_emb = build_backbone(ModelConfig(backbone=f"timm/{name}", **model), channels, (size,))[1]
    assert embeddings.shape == (2, d_emb) == (2, theirs.num_features)


def test_arguments_that_a_model_refuses_leave_its_weights_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even where it draws numbers first."""
    expected, real = build("timm/test_convnext").state_dict(), timm.create_model

    def late(name: str, **arguments: Any) -> nn.Module:
        torch.rand(1)
        return real(name, **arguments)

    monkeypatch.setattr(timm, "create_model", late)
    torch.manual_seed(5)
    once = late("test_convnext", num_classes=0).state_dict()
    found = build("timm/test_convnext").state_dict()
    assert all(torch.equal(t, once[n]) for n, t in found.items())
    assert not all(torch.equal(t, expected[n]) for n, t in found.items())


def test_small_views_get_interpolated_positions_and_the_same_weights() -> None:
    both, one = build(TINY, (32, 16), patch_size=4), build(TINY, patch_size=4)
    assert all(torch.equal(t, one.state_dict()[n]) for n, t in both.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(both.eval()(images), one.eval()(images))
    assert both(images[:, :, :16, :16]).shape == (2, 64)
    with refused(UsageError, "16 pixels"):
        build("timm/beit_base_patch16_224", (32, 16), patch_size=8)


@pytest.mark.parametrize("name", ["fasternet_t0", "ghostnet_050", "vit_relpos_medium_patch16_224"])
def test_a_step_draws_no_random_numbers(name: str) -> None:
    """With timm's defaults they drop paths, features, and weights of relative positions."""
    state = torch.get_rng_state()
    images = torch.zeros(2, 3, 32, 32)
    timm.create_model(name, num_classes=0, **({"img_size": 32} if "vit" in name else {}))(images)
    assert not torch.equal(torch.get_rng_state(), state)
    module = build(f"timm/{name}").train()
    state = torch.get_rng_state()
    module(images)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_draws_random_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) + torch.randn(())

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: Noisy())
    with refused(UsageError, TINY, "random numbers"):
        build(TINY)


@pytest.mark.parametrize("pooled", [False, True])
def test_what_gives_no_embedding_of_one_width_is_refused(
    pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Flatten() if pooled else nn.Identity()
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: module)
    with refused(UsageError, TINY, "small_views" if pooled else "pooled"):
        build(TINY, (32, 16))


def test_running_statistics_start_untouched() -> None:
    module = build("timm/resnet18")
    assert not module.bn1.running_mean.any() and module.bn1.num_batches_tracked == 0  # type: ignore[union-attr, operator]


# ---- frozen patches --------------------------------------------------------------------------


def test_frozen_patches_are_moco_v3s() -> None:
    free, frozen = build(TINY, patch_size=4), build(TINY, patch_size=4, frozen_patch=True)
    weight, bias = frozen.patch_embed.proj.weight, frozen.patch_embed.proj.bias  # type: ignore[union-attr]
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    bound = (6 / (3 * 4 * 4 + 64)) ** 0.5  # Xavier's, uniform
    assert 0.98 * bound < weight.abs().max() <= bound and not bias.any()
    held = {name for name, p in frozen.named_parameters() if not p.requires_grad}
    assert held == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert all(p.requires_grad for p in free.parameters())
    with refused(UsageError, "model.frozen_patch"):
        build("timm/test_convnext", frozen_patch=True)


# ---- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model", "named"),
    [
        ("timm/vit_tinny_patch16_224", {}, "did you mean vit_tiny_patch16_224?"),
        ("timm/resnet18", {"patch_size": 4}, "model.patch_size=4"),
        (TINY, {"patch_size": 5}, "model.patch_size=5"),
        ("timm/test_convnext", {}, "16 pixels"),  # too few to halve so often
    ],
)
def test_what_timm_cannot_build_is_a_usage_error(
    name: str, model: dict[str, Any], named: str
) -> None:
    with refused(UsageError, named):
        build(name, (16,), **model)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with refused(Unavailable, "rdm-fast[timm]"):
        build(TINY)


# ---- what a model has use for ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (TINY, torch.contiguous_format),
        ("timm/test_convnext", torch.channels_last),
        ("resnet8", torch.channels_last),
    ],
)
def test_channels_last_is_for_convolutions_that_overlap(
    name: str, layout: torch.memory_format
) -> None:
    assert memory_format(build(name)) == layout


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_synchronized_batch_norms_of_timm_keep_their_activations(device: str) -> None:
    module = build("timm/test_efficientnet").eval()
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    names = list(module.state_dict())
    images = torch.randn(2, 3, 32, 32)
    expected = module(images)
    twin = synchronize(module, torch.device(device))
    kind = CpuSyncBatchNorm if device == "cpu" else nn.SyncBatchNorm
    assert sum(isinstance(m, kind) for m in twin.modules()) == norms > 0
    assert list(twin.state_dict()) == names
    if device == "cpu":
        assert torch.equal(twin(images), expected)
    else:
        assert sum(isinstance(m, nn.SiLU) for m in twin.modules()) > 1
