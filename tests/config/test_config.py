"""rdm_fast.config: limits of every setting, combinations, and derived values."""

import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdm_fast.config import Config, FilterConfig, OptimConfig
from rdm_fast.errors import UsageError

CONFIG = Config(optim=OptimConfig(warmup_epochs=0))
SYMMETRIC = {"method": "symsimsiam", "predictor": "none"}

LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, math.inf),
    "data.workers": (0, math.inf), "data.max_bad": (0.0, 1.0),
    **{f"augment.{name}": (8, math.inf) for name in ("size", "small_size")},
    **{
        f"augment.view{i}.{name}": (0.0, high)
        for i in (1, 2)
        for name, high in {
            "jitter": 1.0, "grey": 1.0, "blur": 1.0, "solarize": 1.0, "flip": 1.0, "hue": 0.5,
            "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "rotate": 180.0, "shear": 89.0,
        }.items()
    },
    "model.projector_layers": (2, 3),
    **{f"model.{name}": (1, math.inf) for name in (
        "width", "projector_hidden", "projector_dim", "predictor_hidden")},
    "model.patch_size": (0, 0),  # of the ResNet here
    **{f"optim.{name}": (1, math.inf) for name in ("epochs", "global_batch", "accumulate")},
    **{f"optim.{name}": (0.0, math.inf) for name in (
        "base_lr", "warmup_epochs", "warmup_lr", "final_lr", "weight_decay", "clip_norm",
        "clip_each")},
    "optim.weight_decay_end": (-1.0, math.inf),
    **{f"optim.{name}": (0.0, 1.0) for name in ("momentum", "ema_start", "ema_end")},
    **{f"log.{name}": (1, math.inf) for name in (
        "every", "save_every", "knn_bank", "max_nonfinite")},
    "log.knn_every": (0, math.inf), "log.spectrum_every": (0, math.inf), "log.keep": (2, math.inf),
    "guard.min_rank": (0.0, math.inf), "guard.min_std": (0.0, math.inf),
    "guard.warmup": (0.0, 1.0), "guard.patience": (1, math.inf),
}  # fmt: skip


def changed(config: Any, settings: dict[str, Any]) -> Any:
    """The configuration with some settings, by dotted name."""
    own = {name: value for name, value in settings.items() if "." not in name}
    for table in {name.partition(".")[0] for name in settings} - {*own}:
        inner = {name.removeprefix(f"{table}."): value for name, value in settings.items()
                 if name.startswith(f"{table}.")}  # fmt: skip
        own[table] = changed(getattr(config, table), inner)
    return replace(config, **own)


def message(**settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        changed(CONFIG, settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", LIMITS)
def test_a_number_is_accepted_up_to_its_limits_and_named_beyond_them(name: str) -> None:
    low, high = LIMITS[name]
    beyond: list[float] = []
    if isinstance(low, int):
        beyond = [low - 1] + [high + 1] * (high < math.inf)
    else:
        beyond = [math.nextafter(low, -math.inf), math.nextafter(high, math.inf), math.nan]
    for value in (low, high):
        if value < math.inf:
            changed(CONFIG, {name: value})
    for value in beyond:
        assert f"{name}={value}" in message(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "byol", "predictor": "none"},
        {"method": "symsimsiam", "predictor": "spectral"},
        {"method": "moco"},
        {"data.name": "digits", "data.classes": "names.txt"},
        {"data.verify": "full"},
        {"data.image_column": "picture"},
        {"data.label_column": "animal"},
        {"data.fraction": 0.0},
        {"data.fraction": 1.1},
        {"data.fraction": math.nan},
        {"augment.view1.crop_scale": (0.9, 0.1)},
        {"augment.view1.crop_scale": (0.0, 1.0)},
        {"augment.view2.crop_scale": (0.5, 1.1)},
        {"augment.view2.crop_ratio": (0.0, 1.0)},
        {"augment.view1.blur_sigma": (2.0, 1.0)},
        {"augment.view1.blur_sigma": (1.0, math.inf)},
        {"augment.view1.blur_sigma": (1.0, 4.1)},
        {"augment.small_scale": (0.3, 0.1)},
        {"augment.small_views": -1},
        {"augment.small_views": 2, "augment.small_size": 8, **SYMMETRIC},
        {"augment.small_blur": -0.5},
        {"augment.small_size": 96, "augment.small_views": 2},
        {"augment.mean": (0.1, 0.2), "augment.std": (1.0,)},
        {"augment.std": (0.0,), "augment.mean": (0.1,)},
        {"augment.mean": (math.nan,), "augment.std": (1.0,)},
        {"model.stem": "imagenet", "model.backbone": "resnet8"},
        {"model.backbone": "resnet101"},
        {"model.backbone": "vit_tiny_patch16_224"},
        {"model.backbone": "timm/"},
        {"model.backbone": "timm/hf-hub:someone/something"},
        {"model.backbone": "timm/resnet18.a1_in1k"},
        {"model.stem": "cifar_pad2", "model.backbone": "timm/test_vit"},
        {"model.patch_size": 4, "model.backbone": "resnet18"},
        {"model.frozen_patch": True, "model.backbone": "resnet18"},
        {"filter.kind": "custom"},
        {"filter.sigma": math.nan},
        {"filter.cutoff": 0.0},
        {"filter.cutoff": 1.0},
        {"filter.basis": "online", "filter.location": "online"},
        {"filter.engine": "reference", "filter.center": True},
        {"filter.engine": "gemm", "filter.center": True},
        {"filter.engine": "gemm", "filter.cutoff": 0.2},
        {"optim.optimizer": "lamb"},
        {"optim.backend": "apex", "optim.optimizer": "lars"},
        {"optim.warmup_epochs": 61.0, "optim.epochs": 60},
        {"optim.clip_norm": 1.0, "optim.clip_each": 3.0},
        {"parallel.bucket_mb": 0.0},
        {"parallel.bucket_mb": math.inf},
        {"parallel.static_graph": True, "optim.accumulate": 2},
    ],
    ids=str,
)
def test_an_impossible_setting_or_combination_is_named(settings: dict[str, Any]) -> None:
    assert next(iter(settings)) in message(**settings)


def test_limits_that_are_inclusive() -> None:
    changed(CONFIG, {"augment.view1.crop_scale": (1.0, 1.0), "augment.small_scale": (0.1, 1.0)})
    changed(CONFIG, {"optim.warmup_epochs": 60.0, "optim.epochs": 60})
    small = {"augment.small_views": 2, "augment.small_size": 32, "augment.size": 32}
    changed(CONFIG, small)


def test_small_views_are_drawn_as_view1_but_for_crop_and_blur() -> None:
    of_view1 = {"augment.view1.blur": 0.3, "augment.view1.flip": 0.5}
    of_view1 |= {"augment.small_views": 1, "augment.small_size": 16}
    for asked, blur in ((-1.0, 0.3), (0.0, 0.0), (1.0, 1.0)):
        augment = changed(CONFIG, {**of_view1, "augment.small_blur": asked}).augment
        assert augment.views[2] == replace(augment.view1, crop_scale=(0.05, 0.14), blur=blur)


def test_an_unknown_choice_suggests_the_nearest() -> None:
    assert "did you mean simsiam?" in message(method="simsam")
    assert "bilinear, bicubic" in message(**{"augment.interpolation": "zzz"})


def test_a_response_is_a_function_and_goes_with_kind_custom() -> None:
    assert FilterConfig(kind="custom", response=abs).response is abs
    for wrong in ({"kind": "custom", "response": 3}, {"response": abs}):
        with pytest.raises(UsageError):
            FilterConfig(**wrong)  # type: ignore[arg-type]


def test_a_model_of_timm_is_named_behind_timm() -> None:
    vit = {"model.backbone": "timm/vit_tiny_patch16_224", "model.stem": "cifar"}
    config = changed(CONFIG, {**vit, "model.patch_size": 4, "model.frozen_patch": True})
    assert config.model.timm_name == "vit_tiny_patch16_224"
    assert CONFIG.model.timm_name == ""


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().optim.epochs = 3  # type: ignore[misc]


# ---- derived values --------------------------------------------------------------------------


def optim(global_batch: int, accumulate: int = 1, **other: float) -> OptimConfig:
    return OptimConfig(global_batch=global_batch, accumulate=accumulate, **other)  # type: ignore[arg-type]


@given(share=st.integers(2, 50), world=st.integers(1, 16), accumulate=st.integers(1, 8))
def test_local_batches_add_up_to_the_global_batch(share: int, world: int, accumulate: int) -> None:
    local = optim(share * world * accumulate, accumulate).local_batch(world)
    assert local * world == share * world * accumulate
    assert local % accumulate == 0


@pytest.mark.parametrize(
    ("global_batch", "accumulate", "world", "offered"),
    [(256, 1, 3, [255, 258]), (256, 3, 1, [255, 258]), (256, 2, 3, [252, 258]),
     (4, 1, 4, [8]), (3, 1, 4, [8]), (1, 1, 1, [2])],
)  # fmt: skip
def test_a_batch_that_does_not_divide_is_answered_with_the_nearest_that_do(
    global_batch: int, accumulate: int, world: int, offered: list[int]
) -> None:
    with pytest.raises(UsageError) as caught:
        optim(global_batch, accumulate).local_batch(world)
    text = str(caught.value)
    assert f"optim.global_batch={global_batch}" in text and f"{world} rank(s)" in text
    assert [int(batch) for batch in text.rpartition("use ")[2].split(" or ")] == offered


@given(global_batch=st.integers(1, 400), world=st.integers(1, 16), accumulate=st.integers(1, 6))
def test_every_batch_that_the_message_offers_divides(
    global_batch: int, world: int, accumulate: int
) -> None:
    try:
        optim(global_batch, accumulate).local_batch(world)
    except UsageError as error:
        offered = [int(batch) for batch in str(error).rpartition("use ")[2].split(" or ")]
        for batch in offered:
            optim(batch, accumulate).local_batch(world)
        assert min(abs(batch - global_batch) for batch in offered) <= 2 * world * accumulate


@pytest.mark.parametrize(
    ("base", "batch", "lr"), [(0.5, 256, 0.5), (0.05, 512, 0.1), (0.4, 64, 0.1)]
)
def test_the_learning_rate_is_scaled_by_the_global_batch_over_256(
    base: float, batch: int, lr: float
) -> None:
    assert optim(batch, base_lr=base).lr == pytest.approx(lr)
