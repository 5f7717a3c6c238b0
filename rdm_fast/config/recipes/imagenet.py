"""Recipes for ImageNet-100 and ImageNet."""

from dataclasses import replace

from rdm_fast.config import (
    AugmentConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ViewConfig,
)
from rdm_fast.config.recipes.parts import (
    LOW_PASS,
    WHITEN,
    byol_heads,
    byol_views,
    lars,
    rdm,
    symmetric,
)


def imagenet100_simsiam() -> Config:
    """SimSiam with its learned predictor on ImageNet-100, ResNet-18."""
    view = ViewConfig(crop_scale=(0.08, 1.0), jitter=0.8, grey=0.2, blur=0.5, flip=0.5)
    return Config(
        predictor="mlp",
        data=DataConfig(name="folder", root="data/imagenet100", workers=8),
        augment=AugmentConfig(
            size=224,
            interpolation="bicubic",
            std=(0.228, 0.224, 0.225),  # the reference's, on ImageNet-100 only
            view1=view,
            view2=view,
        ),
        model=ModelConfig(backbone="resnet18", stem="imagenet", zero_init_residual=True),
        optim=OptimConfig(epochs=400, global_batch=256, base_lr=0.5, weight_decay=1e-5),
        precision="bf16",
    )


def imagenet100_byol() -> Config:
    """BYOL with its learned predictor on ImageNet-100, ResNet-18."""
    config = imagenet100_simsiam()
    return replace(
        config,
        method="byol",
        augment=byol_views(config.augment, 1.0, 0.1),
        model=byol_heads(config.model, predictor_hidden=8192),
        optim=lars(config.optim),
    )


def imagenet100_rdm_simsiam() -> Config:
    """SimSiam with a spectral filter (target, sigma -1) on ImageNet-100."""
    return rdm(imagenet100_simsiam(), WHITEN)


def imagenet100_rdm_byol() -> Config:
    """BYOL with a spectral filter (online, sigma 1) on ImageNet-100."""
    return rdm(imagenet100_byol(), LOW_PASS)


def imagenet100_symsimsiam() -> Config:
    """The symmetric control on ImageNet-100."""
    return symmetric(imagenet100_simsiam())


def imagenet_simsiam() -> Config:
    """SimSiam with its learned predictor on ImageNet, ResNet-50, 100 epochs."""
    view = ViewConfig(crop_scale=(0.2, 1.0), jitter=0.8, grey=0.2, blur=0.5, flip=0.5)
    return Config(
        predictor="mlp",
        data=DataConfig(name="folder", root="data/imagenet", workers=8),
        augment=AugmentConfig(size=224, view1=view, view2=view),
        model=ModelConfig(backbone="resnet50", stem="imagenet", zero_init_residual=True),
        optim=OptimConfig(
            epochs=100, global_batch=512, base_lr=0.05, warmup_epochs=0, weight_decay=1e-4
        ),
        log=LogConfig(every=50),
        precision="bf16",
    )


def imagenet_byol() -> Config:
    """BYOL on ImageNet, ResNet-50, 100 epochs.

    The optimizer is that of BYOL's own 100-epoch runs (deepmind-research, byol/configs/byol.py) and
    of solo-learn's scripts/pretrain/imagenet/byol.yaml, at SimSiam's batch of 512.
    """
    config = imagenet_simsiam()
    view1 = replace(config.augment.view1, crop_scale=(0.08, 1.0))
    augment = byol_views(replace(config.augment, view1=view1), 1.0, 0.1)
    optim = replace(
        lars(config.optim),
        base_lr=0.45,
        warmup_epochs=10,
        weight_decay=1e-6,
        lars_eta=1e-3,
        lars_clip=False,
    )
    return replace(
        config,
        method="byol",
        augment=replace(augment, interpolation="bicubic"),
        model=byol_heads(config.model),
        optim=optim,
    )


def imagenet_rdm_simsiam() -> Config:
    """SimSiam with a spectral filter (target, sigma -1) on ImageNet."""
    return rdm(imagenet_simsiam(), WHITEN)


def imagenet_rdm_byol() -> Config:
    """BYOL with a spectral filter (online, sigma 1) on ImageNet."""
    return rdm(imagenet_byol(), LOW_PASS)


def imagenet_symsimsiam() -> Config:
    """The symmetric control on ImageNet."""
    return symmetric(imagenet_simsiam())
