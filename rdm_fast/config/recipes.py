"""Recipes: functions that return a whole `Config`.

Hyper-parameters are those of the paper's released code (PKU-ML/Rank-Differential-Mechanism, with
solo-learn's CIFAR and ImageNet-100 recipes and SimSiam's ImageNet recipe). It has no BYOL on
ImageNet, whose optimizer is BYOL's own. docs/reproducing.md lists the deliberate differences. A
recipe with a learned predictor and its RDM twin differ in the predictor only.
"""

from collections.abc import Callable
from dataclasses import replace

from rdm_fast.config import (
    AugmentConfig,
    Config,
    DataConfig,
    DataName,
    FilterConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ViewConfig,
)

WHITEN = FilterConfig(location="target", sigma=-1.0)
"""The target filter of the released scripts: weights every direction of the target equally."""
LOW_PASS = FilterConfig(location="online", sigma=1.0)
"""The online filter of the released scripts: amplifies strong directions."""


def _rdm(config: Config, spectral: FilterConfig) -> Config:
    return replace(config, predictor="spectral", filter=spectral)


def _symmetric(config: Config) -> Config:
    return replace(config, method="symsimsiam", predictor="none")


# ---- digits: the embedded default, about a minute on two CPU cores ---------------------------


def _digits() -> Config:
    view = ViewConfig(
        crop_scale=(0.5, 1.0),
        crop_ratio=(0.8, 1.25),
        rotate=20.0,
        shear=12.0,
        jitter=1.0,
        brightness=0.4,
        contrast=0.4,
        saturation=0.0,
        hue=0.0,
    )
    return Config(
        data=DataConfig(name="digits", loader="resident"),
        augment=AugmentConfig(size=16, mean=(0.3053,), std=(0.3609,), view1=view, view2=view),
        model=ModelConfig(
            backbone="resnet8",
            stem="cifar",
            width=24,
            projector_hidden=256,
            projector_dim=256,
            predictor_hidden=64,
        ),
        optim=OptimConfig(
            epochs=60,
            global_batch=200,
            base_lr=0.256,
            warmup_epochs=2,
            warmup_lr=0.0,
            weight_decay=1e-4,
        ),
        log=LogConfig(every=7, knn_every=10, save_every=70),
        seed=0,
    )


def digits_rdm_simsiam() -> Config:
    """RDM on scikit-learn's embedded digits, on a CPU in about a minute: the default."""
    return replace(_digits(), filter=WHITEN)


def digits_simsiam() -> Config:
    """SimSiam with its learned predictor, on the embedded digits."""
    return replace(_digits(), predictor="mlp")


def digits_byol() -> Config:
    """BYOL with its learned predictor and EMA target, on the embedded digits."""
    config = replace(_digits(), method="byol", predictor="mlp")
    return replace(config, optim=replace(config.optim, fixed_predictor_lr=False))


def digits_rdm_byol() -> Config:
    """BYOL with the spectral filter in place of the predictor, on the embedded digits."""
    return _rdm(digits_byol(), LOW_PASS)


def digits_symsimsiam() -> Config:
    """The symmetric control, without predictor or stop-gradient, on the embedded digits."""
    return _symmetric(_digits())


# ---- CIFAR -----------------------------------------------------------------------------------

CIFAR_STATISTICS: dict[DataName, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def _cifar_simsiam(name: DataName) -> Config:
    view = ViewConfig(crop_scale=(0.08, 1.0), jitter=0.8, grey=0.2, flip=0.5)
    mean, std = CIFAR_STATISTICS[name]
    return Config(
        predictor="mlp",
        data=DataConfig(name=name),
        augment=AugmentConfig(
            size=32, interpolation="bicubic", mean=mean, std=std, view1=view, view2=view
        ),
        model=ModelConfig(backbone="resnet18", stem="cifar_pad2", zero_init_residual=True),
        optim=OptimConfig(epochs=400, global_batch=256, base_lr=0.5, weight_decay=1e-5),
        precision="bf16",
    )


def _cifar_byol(name: DataName) -> Config:
    config = _cifar_simsiam(name)
    view1 = replace(config.augment.view1, saturation=0.2)
    return replace(
        config,
        method="byol",
        augment=replace(config.augment, view1=view1, view2=replace(view1, solarize=0.2)),
        model=_byol_heads(config.model),
        optim=replace(_lars(config.optim), base_lr=1.0),
    )


def _byol_heads(model: ModelConfig, predictor_hidden: int = 4096) -> ModelConfig:
    return replace(
        model,
        zero_init_residual=False,
        projector_layers=2,
        projector_hidden=4096,
        projector_dim=256,
        projector_bn=False,
        predictor_hidden=predictor_hidden,
    )


def _lars(optim: OptimConfig) -> OptimConfig:
    return replace(optim, optimizer="lars", decay_norm_and_bias=False, fixed_predictor_lr=False)


def cifar10_simsiam() -> Config:
    """SimSiam with its learned predictor on CIFAR-10."""
    return _cifar_simsiam("cifar10")


def cifar10_byol() -> Config:
    """BYOL with its learned predictor on CIFAR-10."""
    return _cifar_byol("cifar10")


def cifar10_rdm_simsiam() -> Config:
    """SimSiam with a spectral filter (target, sigma -1) on CIFAR-10."""
    return _rdm(cifar10_simsiam(), WHITEN)


def cifar10_rdm_byol() -> Config:
    """BYOL with a spectral filter (target, sigma -1) on CIFAR-10."""
    return _rdm(cifar10_byol(), WHITEN)


def cifar10_symsimsiam() -> Config:
    """The symmetric control on CIFAR-10."""
    return _symmetric(cifar10_simsiam())


def cifar100_simsiam() -> Config:
    """SimSiam with its learned predictor on CIFAR-100."""
    return _cifar_simsiam("cifar100")


def cifar100_byol() -> Config:
    """BYOL with its learned predictor on CIFAR-100."""
    return _cifar_byol("cifar100")


def cifar100_rdm_simsiam() -> Config:
    """SimSiam with a spectral filter (target, sigma -1) on CIFAR-100."""
    return _rdm(cifar100_simsiam(), WHITEN)


def cifar100_rdm_byol() -> Config:
    """BYOL with a spectral filter (target, sigma -1) on CIFAR-100."""
    return _rdm(cifar100_byol(), WHITEN)


def cifar100_symsimsiam() -> Config:
    """The symmetric control on CIFAR-100."""
    return _symmetric(cifar100_simsiam())


# ---- ImageNet-100 and ImageNet ---------------------------------------------------------------


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
    view1 = replace(config.augment.view1, saturation=0.2, blur=1.0)
    view2 = replace(view1, blur=0.1, solarize=0.2)
    return replace(
        config,
        method="byol",
        augment=replace(config.augment, view1=view1, view2=view2),
        model=_byol_heads(config.model, predictor_hidden=8192),
        optim=_lars(config.optim),
    )


def imagenet100_rdm_simsiam() -> Config:
    """SimSiam with a spectral filter (target, sigma -1) on ImageNet-100."""
    return _rdm(imagenet100_simsiam(), WHITEN)


def imagenet100_rdm_byol() -> Config:
    """BYOL with a spectral filter (online, sigma 1) on ImageNet-100."""
    return _rdm(imagenet100_byol(), LOW_PASS)


def imagenet100_symsimsiam() -> Config:
    """The symmetric control on ImageNet-100."""
    return _symmetric(imagenet100_simsiam())


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
    view1 = replace(config.augment.view1, crop_scale=(0.08, 1.0), saturation=0.2, blur=1.0)
    view2 = replace(view1, blur=0.1, solarize=0.2)
    optim = replace(
        _lars(config.optim),
        base_lr=0.45,
        warmup_epochs=10,
        weight_decay=1e-6,
        lars_eta=1e-3,
        lars_clip=False,
    )
    return replace(
        config,
        method="byol",
        augment=replace(config.augment, interpolation="bicubic", view1=view1, view2=view2),
        model=_byol_heads(config.model),
        optim=optim,
    )


def imagenet_rdm_simsiam() -> Config:
    """SimSiam with a spectral filter (target, sigma -1) on ImageNet."""
    return _rdm(imagenet_simsiam(), WHITEN)


def imagenet_rdm_byol() -> Config:
    """BYOL with a spectral filter (online, sigma 1) on ImageNet."""
    return _rdm(imagenet_byol(), LOW_PASS)


def imagenet_symsimsiam() -> Config:
    """The symmetric control on ImageNet."""
    return _symmetric(imagenet_simsiam())


DEFAULT = digits_rdm_simsiam.__name__

RECIPES: dict[str, Callable[[], Config]] = {
    f"{data}_{method}": globals()[f"{data}_{method}"]
    for data in ("digits", "cifar10", "cifar100", "imagenet100", "imagenet")
    for method in ("rdm_simsiam", "rdm_byol", "simsiam", "byol", "symsimsiam")
}


def recipe(name: str) -> Config:
    """The configuration of a recipe, with run folder runs/<name>."""
    return replace(RECIPES[name](), out=f"runs/{name}")
