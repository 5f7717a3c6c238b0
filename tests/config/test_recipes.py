"""rdm_fast.config.recipes against the hyper-parameters of the RDM paper's released code.

The tables are written out here as they stand in that code (PKU-ML/Rank-Differential-Mechanism,
commit 92d7e8d: bash_files/pretrain and imagenet/), and in solo-learn for the learned predictors.
ImageNet BYOL has no counterpart there: its numbers are those of BYOL's own 100-epoch runs. The
ViT recipes have MoCo v3's, DINO's and stable-pretraining's. The digits recipes have no source but
this project.
"""

import re
from dataclasses import fields, replace
from typing import Any
from unittest.mock import ANY

import pytest
import torch

from rdm_fast.config import Config, FilterConfig, OptimConfig, ViewConfig
from rdm_fast.config.recipes import DEFAULT, RECIPES, recipe
from rdm_fast.config.saved import config_to_dict, flat
from rdm_fast.filters.response import advice, few_rows
from rdm_fast.methods import build_method
from rdm_fast.optim import build_optimizer

FAMILIES = ["cifar10", "cifar100", "imagenet100", "imagenet"]
VIT_FAMILIES = ["digits_vit", "cifar10_vit", "imagenet100_vit"]
NEW = ["dino", "swav"]
METHODS = ["rdm_simsiam", "rdm_byol", "simsiam", "byol", "symsimsiam"]

# heads as layers, hidden, dim, last norm
SIMSIAM = {"zero_init": True, "projector": (3, 2048, 2048, True), "predictor_hidden": 512}
BYOL = {"zero_init": False, "projector": (2, 4096, 256, False), "predictor_hidden": 4096}
CIFAR = {"backbone": "resnet18", "stem": "cifar_pad2"}
IMAGENET100 = {"backbone": "resnet18", "stem": "imagenet"}
IMAGENET = {"backbone": "resnet50", "stem": "imagenet"}
MODELS: dict[str, dict[str, Any]] = {
    "cifar simsiam": CIFAR | SIMSIAM,
    "cifar byol": CIFAR | BYOL,
    "imagenet100 simsiam": IMAGENET100 | SIMSIAM,
    "imagenet100 byol": IMAGENET100 | BYOL | {"predictor_hidden": 8192},
    "imagenet simsiam": IMAGENET | SIMSIAM,
    "imagenet byol": IMAGENET | BYOL,
}
# patch, whether it is frozen; --stop-grad-conv1 of moco-v3's CONFIG.md
VITS = {
    "digits_vit": ("timm/test_vit", 4, False),
    "cifar10_vit": ("timm/vit_tiny_patch16_224", 4, False),
    "imagenet100_vit": ("timm/vit_small_patch16_224", 16, True),
}

# Every field of OptimConfig, so that a new one needs an entry, and a source, here.
EVERYWHERE = {
    "backend": "torch", "accumulate": 1, "momentum": 0.9, "final_lr": 0.0,
    "weight_decay_end": -1.0, "clip_norm": 0.0, "clip_each": 0.0,
}  # fmt: skip
# exclude_bias_n_norm of solo-learn's LARS; its SGD decays all parameters, as SimSiam's does
SGD = EVERYWHERE | {
    "optimizer": "sgd", "decay_norm_and_bias": True,
    "fixed_predictor_lr": True,  # SimSiam's --fix-pred-lr, solo-learn's static_lr
    "lars_eta": ANY, "lars_clip": ANY, "ema_start": ANY, "ema_end": ANY,  # without effect
}  # fmt: skip
LARS = EVERYWHERE | {
    "optimizer": "lars", "decay_norm_and_bias": False, "fixed_predictor_lr": False,
    "lars_eta": 0.02, "lars_clip": True,  # --eta_lars 0.02 --grad_clip_lars of cifar/rdmbyol.sh
    "ema_start": 0.99, "ema_end": 1.0,  # --base_tau_momentum, --final_tau_momentum
}  # fmt: skip
# cifar/rdm*.sh and imagenet-100/rdm*.sh; warm-up: defaults of solo/methods/base.py
SOLO = {
    "epochs": 400, "global_batch": 256, "weight_decay": 1e-5, "warmup_epochs": 10, "warmup_lr": 3e-5
}  # fmt: skip
OURS = EVERYWHERE | {  # the digits': no outside source
    "epochs": 60, "global_batch": 200, "base_lr": 0.256, "weight_decay": 1e-4,
    "warmup_epochs": 2, "warmup_lr": 0.0,
}  # fmt: skip
# moco-v3, CONFIG.md, "ViT-Small, 1-node (8-GPU), 1024-batch": --optimizer=adamw --weight-decay=.1
# --warmup-epochs=40, from 0 in adjust_learning_rate, the predictor as the rest; the EMA of BYOL is
# stable-pretraining's (methods/byol.py); no decay of vectors: get_params_groups of dino's utils.py
ADAMW = EVERYWHERE | {
    "optimizer": "adamw", "decay_norm_and_bias": False, "fixed_predictor_lr": False,
    "weight_decay": 0.1, "warmup_epochs": 40, "warmup_lr": 0.0,
    "ema_start": 0.99, "ema_end": 1.0, "momentum": ANY, "lars_eta": ANY, "lars_clip": ANY,
}  # fmt: skip
DIGITS_VIT = ADAMW | {"epochs": 60, "global_batch": 200, "warmup_epochs": 6}
# 5e-4 at a batch of 256: stable-pretraining, benchmarks/imagenet10/RESULTS.md; else solo-learn's
CIFAR_VIT = ADAMW | {"epochs": 400, "global_batch": 256, "base_lr": 5e-4}
IMAGENET100_VIT = ADAMW | {  # --lr=1.5e-4 -b 1024 --epochs=300; decay: dino's main_dino.py
    "epochs": 300, "global_batch": 1024, "base_lr": 1.5e-4,
    "weight_decay": 0.04, "weight_decay_end": 0.4,
}  # fmt: skip
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "digits_vit simsiam": DIGITS_VIT | {"base_lr": 1e-3},
    "digits_vit byol": DIGITS_VIT | {"base_lr": 2.5e-3},
    "cifar_vit simsiam": CIFAR_VIT, "cifar_vit byol": CIFAR_VIT,
    "imagenet100_vit simsiam": IMAGENET100_VIT, "imagenet100_vit byol": IMAGENET100_VIT,
    "digits simsiam": SGD | OURS,
    "digits byol": SGD | OURS | {"fixed_predictor_lr": False, "ema_start": 0.99, "ema_end": 1.0},
    "cifar simsiam": SGD | SOLO | {"base_lr": 0.5},
    "cifar byol": LARS | SOLO | {"base_lr": 1.0},
    "imagenet100 simsiam": SGD | SOLO | {"base_lr": 0.5},
    "imagenet100 byol": LARS | SOLO | {"base_lr": 0.5},
    # imagenet/main_simsiam.py, run.sh: no warm-up, batch 512
    "imagenet simsiam": SGD | {
        "epochs": 100, "global_batch": 512, "base_lr": 0.05, "weight_decay": 1e-4,
        "warmup_epochs": 0, "warmup_lr": ANY,
    },
    # deepmind-research byol/configs/byol.py at 100 epochs: lr 0.45, weight decay 1e-6, eta 1e-3
    # without a clip, EMA from 0.99, warm-up of 10 epochs; solo-learn's
    # scripts/pretrain/imagenet/byol.yaml agrees and warms up from its default 3e-5. The batch is
    # main_simsiam.py's.
    "imagenet byol": LARS | {
        "epochs": 100, "global_batch": 512, "base_lr": 0.45, "weight_decay": 1e-6,
        "warmup_epochs": 10, "warmup_lr": 3e-5, "lars_eta": 1e-3, "lars_clip": False,
    },
}  # fmt: skip
PEAK = {  # learning rate after scaling by global batch / 256
    "digits": 0.2, "cifar simsiam": 0.5, "cifar byol": 1.0, "imagenet100": 0.5,
    "imagenet simsiam": 0.1, "imagenet byol": 0.9,
    "digits_vit simsiam": 1e-3 * 200 / 256, "digits_vit byol": 2.5e-3 * 200 / 256,
    "cifar_vit": 5e-4, "imagenet100_vit": 6e-4,
}  # fmt: skip

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
FILTERS |= {
    name.replace("_rdm", "_vit_rdm"): FILTERS[name]
    for name in FILTERS
    if name.startswith(("cifar10_", "imagenet100_"))
}


def split(name: str) -> tuple[str, str]:
    """The family of a recipe, such as cifar10 or cifar10_vit, and its method."""
    found = re.fullmatch(r"([a-z]+\d*(?:_vit)?)_(\w+)", name)
    assert found
    return found[1], found[2]


def row(name: str) -> str:
    """The line of a table that a recipe stands on: CIFAR-100's is CIFAR-10's, and so on."""
    family, method = split(name)
    family = re.sub(r"cifar\d+", "cifar", family)
    return f"{family} {'byol' if method.endswith('byol') else 'simsiam'}"


REFERENCE = [f"{family}_{method}" for family in FAMILIES for method in METHODS]


def test_every_data_set_has_every_method() -> None:
    expected = {f"{family}_{m}" for family in ["digits", *FAMILIES, *VIT_FAMILIES] for m in METHODS}
    assert set(RECIPES) == expected | {f"{f}_{m}" for f in ["digits", *FAMILIES] for m in NEW}
    assert DEFAULT == "digits_rdm_simsiam"


# Every setting of DINO's and SwAV's recipes that is not the default of its field. CIFAR and
# ImageNet-100: RDM's bash_files/pretrain/*/dino.sh and swav.sh (92d7e8d) and the defaults of
# solo/methods/dino.py and swav.py; ImageNet: dino's README and main_dino.py (7c446df), swav's
# scripts/swav_200ep_bs256_pretrain.sh (06b1b7c).
VIEW = {"jitter": 0.8, "grey": 0.2, "flip": 0.5}
PALE = VIEW | {"saturation": 0.2}
STRONG = VIEW | {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
EITHER = {"predictor": "none", "precision": "bf16", "model.projector_bn": False,
          "optim.fixed_predictor_lr": False}  # fmt: skip
DINO = EITHER | {
    "method": "dino", "model.projector_dim": 256, "model.projector_activation": "gelu",
    "model.projector_hidden_bn": False, "optim.decay_norm_and_bias": False,
}  # fmt: skip
SWAV = EITHER | {
    "method": "swav", "model.projector_layers": 2, "model.projector_dim": 128,
    "prototypes.centring": "sinkhorn", "prototypes.count": 3000, "prototypes.queue": 3840,
    "optim.optimizer": "lars", "optim.base_lr": 0.6, "optim.final_lr": 6e-4,
    "optim.weight_decay": 1e-6,
}  # fmt: skip
SOLO_DINO = DINO | {
    "optim.optimizer": "lars", "optim.base_lr": 0.3, "optim.weight_decay": 1e-6,
    "optim.epochs": 400, "optim.ema_start": 0.9995,
    "prototypes.teacher_temp": 0.07, "prototypes.teacher_temp_epochs": 50.0,
}  # fmt: skip
SOLO_SWAV = SWAV | {
    "optim.epochs": 400, "prototypes.frozen_epochs": 2.0, "prototypes.queue_epoch": 50.0,
}  # fmt: skip
CIFAR_DATA = {"model.stem": "cifar_pad2", "augment.interpolation": "bicubic"}
FOLDER = {"data.name": "folder", "data.workers": 8, "model.stem": "imagenet", "augment.size": 224}
OF_100 = FOLDER | {
    "data.root": "data/imagenet100", "augment.interpolation": "bicubic",
    "augment.std": [0.228, 0.224, 0.225],
}  # fmt: skip
RN50 = FOLDER | {"data.root": "data/imagenet", "log.every": 50, "model.backbone": "resnet50"}


def of_views(first: dict[str, Any], second: dict[str, Any], area: float) -> dict[str, Any]:
    views = {"view1": first, "view2": second}
    found = {f"augment.{v}.{k}": x for v, each in views.items() for k, x in each.items()}
    return found | {f"augment.{v}.crop_scale": [area, 1.0] for v in views}


DINO_224 = PALE | {"blur": 1.0}, PALE | {"blur": 0.1, "solarize": 0.2}
SWAV_224 = STRONG | {"blur": 0.5}, STRONG | {"blur": 0.5}
PROTOTYPES: dict[str, dict[str, Any]] = {
    "cifar_dino": SOLO_DINO | CIFAR_DATA | of_views(PALE, PALE | {"solarize": 0.2}, 0.08),
    "cifar_swav": SOLO_SWAV | CIFAR_DATA | of_views(STRONG, STRONG, 0.08),
    "imagenet100_dino": SOLO_DINO | OF_100 | of_views(*DINO_224, 0.08),
    "imagenet100_swav": SOLO_SWAV | OF_100 | of_views(*SWAV_224, 0.08),
    "imagenet_dino": DINO | RN50 | of_views(*DINO_224, 0.14) | {
        "augment.interpolation": "bicubic", "augment.small_views": 8, "augment.small_blur": 0.5,
        "prototypes.count": 65536, "optim.global_batch": 512, "optim.base_lr": 0.03,
        "optim.final_lr": 1e-6, "optim.warmup_lr": 0.0, "optim.weight_decay": 1e-4,
        "optim.clip_each": 3.0, "optim.ema_start": 0.996,
    },
    "imagenet_swav": SWAV | RN50 | of_views(*SWAV_224, 0.14) | {
        "augment.std": [0.228, 0.224, 0.225], "augment.small_views": 6,
        "prototypes.queue_epoch": 15.0, "optim.epochs": 200, "optim.warmup_epochs": 0,
        "optim.lars_eta": 1e-3, "optim.lars_clip": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [f"{family}_{m}" for family in FAMILIES for m in NEW])
def test_every_setting_of_dino_and_swav_is_its_source_s(name: str) -> None:
    plain, default = (flat(config_to_dict(c)) for c in (RECIPES[name](), Config()))
    found = {key: value for key, value in plain.items() if value != default[key]}
    expected = PROTOTYPES[re.sub(r"cifar\d+", "cifar", name)]
    if name.startswith("cifar"):
        family = name.partition("_")[0]
        mean, std = NORMALIZATION[family]
        expected = expected | {
            "data.name": family, "augment.mean": [*mean], "augment.std": [*std]
        }  # fmt: skip
    assert found == expected


@pytest.mark.parametrize("name", [n for n in RECIPES if split(n)[1] not in NEW])
def test_every_field_of_the_optimizer_is_its_source_s(name: str) -> None:
    optim, line = RECIPES[name]().optim, row(name)
    assert {field.name: getattr(optim, field.name) for field in fields(OptimConfig)} == (
        OPTIMIZERS[line]
    )
    assert optim.lr == pytest.approx(PEAK.get(line, PEAK.get(line.split()[0])))


@pytest.mark.parametrize(
    ("family", "steep", "flat"),
    [
        # clipped: a rate of min(eta |w| / |g|, lr)
        ("cifar10", 0.02, 1.0 * 1e-3),
        ("imagenet100", 0.02, 0.5 * 1e-3),
        # not clipped: lr eta |w| / |g|, so the gradient's size does not matter
        ("imagenet", 0.9 * 1e-3, 0.9 * 1e-3),
    ],
)
def test_lars_moves_a_layer_by_the_share_of_its_source(
    family: str, steep: float, flat: float
) -> None:
    """|step| / |w| at the peak rate, where |g| / |w| is 10, or 0.001."""
    optim = RECIPES[f"{family}_byol"]().optim
    for size, share in ((10.0, steep), (1e-3, flat)):
        layer = torch.nn.Linear(8, 4, bias=False)
        before = layer.weight.detach().clone()
        layer.weight.grad = size * before.norm() * torch.eye(4, 8) / 2  # the eye's norm
        build_optimizer(layer, optim, torch.device("cpu")).step()
        moved = (layer.weight - before).norm() / before.norm()
        assert moved.item() == pytest.approx(share, rel=0.02)  # weight decay: 1e-5 / 1e-3


@pytest.mark.parametrize("name", REFERENCE)
def test_models_are_the_reference_s(name: str) -> None:
    config = RECIPES[name]()
    model = config.model
    assert MODELS[row(name)] == {
        "backbone": model.backbone,
        "stem": model.stem,
        "zero_init": model.zero_init_residual,
        "projector": (
            model.projector_layers, model.projector_hidden, model.projector_dim, model.projector_bn
        ),
        "predictor_hidden": model.predictor_hidden,
    }  # fmt: skip
    assert config.sync_bn and config.precision == "bf16"
    assert config.seed == 5  # of solo-learn; main_simsiam.py has none


@pytest.mark.parametrize("family", VIT_FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_vit_recipe_is_that_of_the_resnet_with_another_backbone_and_optimizer(
    family: str, method: str
) -> None:
    vit, resnet = RECIPES[f"{family}_{method}"](), RECIPES[f"{family[:-4]}_{method}"]()
    model = vit.model
    assert VITS[family] == (model.backbone, model.patch_size, model.frozen_patch)
    own = {"backbone", "patch_size", "frozen_patch", "stem", "zero_init_residual"}
    restored = {name: getattr(resnet.model, name) for name in own}
    assert replace(vit, model=replace(model, **restored), optim=resnet.optim) == resnet


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
    config, method = RECIPES[name](), split(name)[1]
    without = ("symsimsiam", "dino", "swav")
    expected = "spectral" if "rdm" in method else "none" if method in without else "mlp"
    assert (config.method, config.predictor) == (method.removeprefix("rdm_"), expected)


@pytest.mark.parametrize("name", FILTERS)
def test_filters_are_those_of_the_reference_s_runs(name: str) -> None:
    found = RECIPES[name]().filter
    assert (found.kind, found.location, found.sigma) == FILTERS[name]
    assert found == FilterConfig(location=found.location, sigma=found.sigma)


@pytest.mark.parametrize("name", [name for name in RECIPES if "rdm" in name])
def test_filters_are_on_the_side_where_rdm_raises_the_rank(name: str) -> None:
    config = RECIPES[name]()
    assert advice(config.filter) is None
    assert few_rows(config.optim.global_batch, config.model.projector_dim) is None
    assert config.optim.accumulate == 1  # what batch norm sees, the filter sees


@pytest.mark.parametrize("name", [name for name in RECIPES if "rdm" in name])
def test_an_rdm_recipe_differs_from_its_learned_twin_in_nothing_but_the_predictor(
    name: str,
) -> None:
    rdm, twin = recipe(name), recipe(name.replace("_rdm", ""))
    assert replace(rdm, predictor="mlp", filter=twin.filter, out=twin.out) == twin


@pytest.mark.parametrize("family", ["digits", *FAMILIES, *VIT_FAMILIES])
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
