"""rdm_fast.config.recipes against the hyper-parameters of the RDM paper's released code.

The tables are written out here as they stand in that code (PKU-ML/Rank-Differential-Mechanism,
commit 92d7e8d: bash_files/pretrain and imagenet/), and in solo-learn for the learned predictors.
ImageNet BYOL has no counterpart there: its numbers are those of BYOL's own 100-epoch runs.
"""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from rdm_fast.config import FilterConfig, ViewConfig
from rdm_fast.config.recipes import DEFAULT, RECIPES, recipe
from rdm_fast.filters.response import advice
from rdm_fast.methods import build_method

FAMILIES = ["cifar10", "cifar100", "imagenet100", "imagenet"]
METHODS = ["rdm_simsiam", "rdm_byol", "simsiam", "byol", "symsimsiam"]

# lr is the peak after scaling by global batch / 256; heads as layers, hidden, dim, last norm
SIMSIAM = {
    "zero_init": True, "projector": (3, 2048, 2048, True), "predictor_hidden": 512,
    "optimizer": "sgd", "momentum": 0.9, "decay_1d": True, "final_lr": 0.0,
    "fixed_predictor_lr": True,
}  # fmt: skip
BYOL = {
    "zero_init": False, "projector": (2, 4096, 256, False), "predictor_hidden": 4096,
    "optimizer": "lars", "momentum": 0.9, "decay_1d": False, "final_lr": 0.0,
    "fixed_predictor_lr": False, "ema": (0.99, 1.0),
}  # fmt: skip
SOLO = {"epochs": 400, "batch": 256, "wd": 1e-5, "warmup": 10, "warmup_lr": 3e-5, "seed": 5}
CIFAR = SOLO | {"backbone": "resnet18", "stem": "cifar_pad2"}
IMAGENET100 = SOLO | {"backbone": "resnet18", "stem": "imagenet"}
IMAGENET = {"backbone": "resnet50", "stem": "imagenet", "epochs": 100, "batch": 512}
LARS = {"lars": (0.02, True)}
PRETRAINING: dict[str, dict[str, Any]] = {
    "cifar simsiam": CIFAR | SIMSIAM | {"lr": 0.5},
    "cifar byol": CIFAR | BYOL | LARS | {"lr": 1.0},
    "imagenet100 simsiam": IMAGENET100 | SIMSIAM | {"lr": 0.5},
    "imagenet100 byol": IMAGENET100 | BYOL | LARS | {"lr": 0.5, "predictor_hidden": 8192},
    "imagenet simsiam": IMAGENET | SIMSIAM | {"lr": 0.1, "wd": 1e-4, "warmup": 0},
    "imagenet byol": IMAGENET | BYOL | {"lr": 0.9, "wd": 1e-6, "warmup": 10},
}

# size, least area of a crop, interpolation; saturation; blur and solarize of either view
AUGMENTATION: dict[str, tuple[Any, ...]] = {
    "cifar simsiam": (32, 0.08, "bicubic", 0.4, [(0.0, 0.0), (0.0, 0.0)]),
    "cifar byol": (32, 0.08, "bicubic", 0.2, [(0.0, 0.0), (0.0, 0.2)]),
    "imagenet100 simsiam": (224, 0.08, "bicubic", 0.4, [(0.5, 0.0), (0.5, 0.0)]),
    "imagenet100 byol": (224, 0.08, "bicubic", 0.2, [(1.0, 0.0), (0.1, 0.2)]),
    "imagenet simsiam": (224, 0.2, "bilinear", 0.4, [(0.5, 0.0), (0.5, 0.0)]),
    "imagenet byol": (224, 0.08, "bicubic", 0.2, [(1.0, 0.0), (0.1, 0.2)]),
}

NORMALIZATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet100": ((0.485, 0.456, 0.406), (0.228, 0.224, 0.225)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# kind, location, sigma: bash_files' README commands, imagenet/run.sh, and for BYOL on ImageNet,
# which the reference does not have, those of ImageNet-100
FILTERS = {
    "cifar10_rdm_simsiam": ("poly", "target", -1.0),
    "cifar10_rdm_byol": ("poly", "target", -1.0),
    "cifar100_rdm_simsiam": ("poly", "target", -1.0),
    "cifar100_rdm_byol": ("poly", "target", -1.0),
    "imagenet100_rdm_simsiam": ("poly", "target", -1.0),
    "imagenet100_rdm_byol": ("poly", "online", 1.0),
    "imagenet_rdm_simsiam": ("poly", "target", -1.0),
    "imagenet_rdm_byol": ("poly", "online", 1.0),
}


def row(name: str) -> str:
    """The line of a table that a recipe stands on: CIFAR-100's is CIFAR-10's, and so on."""
    family, _, method = name.partition("_")
    family = "cifar" if family.startswith("cifar") else family
    return f"{family} {'byol' if method.endswith('byol') else 'simsiam'}"


REFERENCE = [f"{family}_{method}" for family in FAMILIES for method in METHODS]


def test_every_data_set_has_every_method() -> None:
    assert set(RECIPES) == {f"{family}_{m}" for family in ["digits", *FAMILIES] for m in METHODS}
    assert DEFAULT == "digits_rdm_simsiam"


@pytest.mark.parametrize("name", REFERENCE)
def test_hyper_parameters_are_the_reference_s(name: str) -> None:
    config, expected = RECIPES[name](), PRETRAINING[row(name)]
    model, optim = config.model, config.optim
    found: dict[str, Any] = {
        "backbone": model.backbone,
        "stem": model.stem,
        "zero_init": model.zero_init_residual,
        "projector": (
            model.projector_layers, model.projector_hidden, model.projector_dim, model.projector_bn
        ),
        "predictor_hidden": model.predictor_hidden,
        "epochs": optim.epochs,
        "batch": optim.global_batch,
        "optimizer": optim.optimizer,
        "momentum": optim.momentum,
        "lr": pytest.approx(optim.lr),
        "wd": optim.weight_decay,
        "decay_1d": optim.decay_norm_and_bias,
        "warmup": optim.warmup_epochs,
        "warmup_lr": optim.warmup_lr,
        "final_lr": optim.final_lr,
        "fixed_predictor_lr": optim.fixed_predictor_lr,
        "seed": config.seed,
        "lars": (optim.lars_eta, optim.lars_clip),
        "ema": (optim.ema_start, optim.ema_end),
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert optim.accumulate == 1 and config.sync_bn and config.precision == "bf16"


@pytest.mark.parametrize("name", REFERENCE)
def test_augmentations_are_the_reference_s(name: str) -> None:
    augment = RECIPES[name]().augment
    size, area, interpolation, saturation, differ = AUGMENTATION[row(name)]
    assert (augment.size, augment.interpolation) == (size, interpolation)
    for view, (blur, solarize) in zip((augment.view1, augment.view2), differ, strict=True):
        assert view == ViewConfig(
            crop_scale=(area, 1.0), crop_ratio=(3 / 4, 4 / 3), rotate=0, shear=0,
            jitter=0.8, brightness=0.4, contrast=0.4, saturation=saturation, hue=0.1, grey=0.2,
            blur=blur, blur_sigma=(0.1, 2.0), solarize=solarize, flip=0.5,
        )  # fmt: skip
    assert (augment.mean, augment.std) == NORMALIZATION[name.partition("_")[0]]


@pytest.mark.parametrize("name", RECIPES)
def test_predictor_and_method_are_those_of_the_name(name: str) -> None:
    config, method = RECIPES[name](), name.partition("_")[2]
    expected = "spectral" if "rdm" in method else "none" if method == "symsimsiam" else "mlp"
    assert (config.method, config.predictor) == (method.removeprefix("rdm_"), expected)


@pytest.mark.parametrize("name", FILTERS)
def test_filters_are_those_of_the_reference_s_runs(name: str) -> None:
    found = RECIPES[name]().filter
    assert (found.kind, found.location, found.sigma) == FILTERS[name]
    assert found == FilterConfig(location=found.location, sigma=found.sigma)


@pytest.mark.parametrize("name", [name for name in RECIPES if "rdm" in name])
def test_filters_are_on_the_side_where_rdm_raises_the_rank(name: str) -> None:
    assert advice(RECIPES[name]().filter) is None


@pytest.mark.parametrize("name", [name for name in RECIPES if "rdm" in name])
def test_an_rdm_recipe_differs_from_its_learned_twin_in_nothing_but_the_predictor(
    name: str,
) -> None:
    rdm, twin = recipe(name), recipe(name.replace("_rdm", ""))
    assert replace(rdm, predictor="mlp", filter=twin.filter, out=twin.out) == twin


@pytest.mark.parametrize("family", ["digits", *FAMILIES])
def test_the_symmetric_control_differs_from_simsiam_in_nothing_but_its_symmetry(
    family: str,
) -> None:
    control, twin = recipe(f"{family}_symsimsiam"), recipe(f"{family}_simsiam")
    assert replace(control, method="simsiam", predictor="mlp", out=twin.out) == twin


@pytest.mark.parametrize("family", ["cifar10", "imagenet100", "imagenet", "digits"])
def test_data_and_loader_are_those_of_the_family(family: str) -> None:
    names = {"imagenet100": "folder", "imagenet": "folder"}
    for method in METHODS:
        data = RECIPES[f"{family}_{method}"]().data
        assert data.name == names.get(family, family) and not data.download
    if family == "digits":
        views = RECIPES["digits_simsiam"]().augment
        assert views.view1.flip == views.view2.flip == 0  # a mirrored digit is another sign
        assert views.view1 == views.view2 and views.size == 16


@pytest.mark.parametrize("name", RECIPES)
def test_a_docstring_names_the_data_set_and_the_filter(name: str) -> None:
    family, text = name.partition("_")[0], RECIPES[name].__doc__ or ""
    place = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet100": "ImageNet-100"}
    assert re.search(rf"{place.get(family, family)}\b", text, re.IGNORECASE)
    if name in FILTERS:
        _, location, sigma = FILTERS[name]
        assert f"({location}, sigma {sigma:g})" in text


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("digits")])
def test_a_digits_recipe_builds_a_model_that_a_cpu_can_train(name: str) -> None:
    config = RECIPES[name]()
    method = build_method(config)
    weights = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert 100_000 < weights < 2_000_000
    images = torch.randn(4, config.augment.channels, config.augment.size, config.augment.size)
    projections = method.projector(method.backbone(images))
    assert projections.shape == (4, config.model.projector_dim)
    assert projections.isfinite().all()
