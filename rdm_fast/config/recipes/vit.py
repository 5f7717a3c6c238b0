"""Recipes for vision transformers of timm: the ResNet recipes, with another backbone and optimizer.

Views and heads are those of the ResNet recipes. stable-pretraining has the same heads on its ViTs
(rbalestr-lab/stable-pretraining, methods/simsiam.py, methods/byol.py), but for a hidden width of
4096 in every predictor of BYOL.

The optimizer is MoCo v3's (facebookresearch/moco-v3, CONFIG.md, ViT-Small on one node): AdamW, a
warm-up from 0, a cosine, and no rate of its own for the predictor; on ImageNet-100 also its rate,
batch, epochs and frozen patch projection. From others are:

    rate on CIFAR-10            stable-pretraining, benchmarks/imagenet10/RESULTS.md
    batch, epochs on CIFAR-10   the ResNet recipes
    decay on ImageNet-100       0.04 to 0.4: DINO (facebookresearch/dino, main_dino.py)
    what is not decayed         DINO's get_params_groups, timm's no_weight_decay
    digits                      this project
"""

from dataclasses import replace

from rdm_fast.config import Config, OptimConfig
from rdm_fast.config.recipes import cifar, digits, imagenet
from rdm_fast.config.recipes.parts import ADAMW


def _vit(
    config: Config, name: str, patch_size: int, optim: OptimConfig, *, frozen_patch: bool = False
) -> Config:
    model = replace(
        config.model,
        backbone=f"timm/{name}",
        stem="cifar",  # of no model of timm
        patch_size=patch_size,
        frozen_patch=frozen_patch,
        zero_init_residual=False,
    )
    return replace(config, model=model, optim=optim)


# ---- digits: a ViT of 0.3 million weights, some minutes on a CPU -----------------------------


def _digits(config: Config) -> Config:
    """With the better of a few rates, by kNN after one run with a learned predictor."""
    rate = 2.5e-3 if config.method == "byol" else 1e-3
    optim = replace(ADAMW, epochs=60, global_batch=200, base_lr=rate, warmup_epochs=6)
    return _vit(config, "test_vit", 4, optim)


def digits_vit_rdm_simsiam() -> Config:
    """RDM-SimSiam with a tiny ViT on the embedded digits, on a CPU in minutes."""
    return _digits(digits.digits_rdm_simsiam())


def digits_vit_simsiam() -> Config:
    """SimSiam with a tiny ViT and a learned predictor, on the embedded digits."""
    return _digits(digits.digits_simsiam())


def digits_vit_byol() -> Config:
    """BYOL with a tiny ViT, a learned predictor and EMA target, on the embedded digits."""
    return _digits(digits.digits_byol())


def digits_vit_rdm_byol() -> Config:
    """BYOL with a tiny ViT, and a spectral filter for the predictor, on the embedded digits."""
    return _digits(digits.digits_rdm_byol())


def digits_vit_symsimsiam() -> Config:
    """The symmetric control with a tiny ViT, on the embedded digits."""
    return _digits(digits.digits_symsimsiam())


# ---- CIFAR-10: ViT-Tiny with patches of 4 pixels ---------------------------------------------


def _cifar10(config: Config) -> Config:
    optim = replace(ADAMW, epochs=400, global_batch=256, base_lr=5e-4, warmup_epochs=40)
    return _vit(config, "vit_tiny_patch16_224", 4, optim)


def cifar10_vit_simsiam() -> Config:
    """SimSiam with its learned predictor on CIFAR-10, ViT-Tiny."""
    return _cifar10(cifar.cifar10_simsiam())


def cifar10_vit_byol() -> Config:
    """BYOL with its learned predictor on CIFAR-10, ViT-Tiny."""
    return _cifar10(cifar.cifar10_byol())


def cifar10_vit_rdm_simsiam() -> Config:
    """SimSiam with a spectral filter (target, sigma -1) on CIFAR-10, ViT-Tiny."""
    return _cifar10(cifar.cifar10_rdm_simsiam())


def cifar10_vit_rdm_byol() -> Config:
    """BYOL with a spectral filter (target, sigma -1) on CIFAR-10, ViT-Tiny."""
    return _cifar10(cifar.cifar10_rdm_byol())


def cifar10_vit_symsimsiam() -> Config:
    """The symmetric control on CIFAR-10, ViT-Tiny."""
    return _cifar10(cifar.cifar10_symsimsiam())


# ---- ImageNet-100: ViT-Small with patches of 16 pixels ---------------------------------------


def _imagenet100(config: Config) -> Config:
    optim = replace(
        ADAMW,
        epochs=300,
        global_batch=1024,
        base_lr=1.5e-4,
        warmup_epochs=40,
        weight_decay=0.04,
        weight_decay_end=0.4,
    )
    return _vit(config, "vit_small_patch16_224", 16, optim, frozen_patch=True)


def imagenet100_vit_simsiam() -> Config:
    """SimSiam with its learned predictor on ImageNet-100, ViT-Small."""
    return _imagenet100(imagenet.imagenet100_simsiam())


def imagenet100_vit_byol() -> Config:
    """BYOL with its learned predictor on ImageNet-100, ViT-Small."""
    return _imagenet100(imagenet.imagenet100_byol())


def imagenet100_vit_rdm_simsiam() -> Config:
    """SimSiam with a spectral filter (target, sigma -1) on ImageNet-100, ViT-Small."""
    return _imagenet100(imagenet.imagenet100_rdm_simsiam())


def imagenet100_vit_rdm_byol() -> Config:
    """BYOL with a spectral filter (online, sigma 1) on ImageNet-100, ViT-Small."""
    return _imagenet100(imagenet.imagenet100_rdm_byol())


def imagenet100_vit_symsimsiam() -> Config:
    """The symmetric control on ImageNet-100, ViT-Small."""
    return _imagenet100(imagenet.imagenet100_symsimsiam())
