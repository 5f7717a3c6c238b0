"""Recipes for CIFAR-10 and CIFAR-100."""

from dataclasses import replace

from rdm_fast.config import (
    AugmentConfig,
    Config,
    DataConfig,
    DataName,
    ModelConfig,
    OptimConfig,
    ViewConfig,
)
from rdm_fast.config.recipes.parts import WHITEN, byol_heads, byol_views, lars, rdm, symmetric

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
    return replace(
        config,
        method="byol",
        augment=byol_views(config.augment, 0.0, 0.0),
        model=byol_heads(config.model),
        optim=replace(lars(config.optim), base_lr=1.0),
    )


def cifar10_simsiam() -> Config:
    """SimSiam with its learned predictor on CIFAR-10."""
    return _cifar_simsiam("cifar10")


def cifar10_byol() -> Config:
    """BYOL with its learned predictor on CIFAR-10."""
    return _cifar_byol("cifar10")


def cifar10_rdm_simsiam() -> Config:
    """SimSiam with a spectral filter (target, sigma -1) on CIFAR-10."""
    return rdm(cifar10_simsiam(), WHITEN)


def cifar10_rdm_byol() -> Config:
    """BYOL with a spectral filter (target, sigma -1) on CIFAR-10."""
    return rdm(cifar10_byol(), WHITEN)


def cifar10_symsimsiam() -> Config:
    """The symmetric control on CIFAR-10."""
    return symmetric(cifar10_simsiam())


def cifar100_simsiam() -> Config:
    """SimSiam with its learned predictor on CIFAR-100."""
    return _cifar_simsiam("cifar100")


def cifar100_byol() -> Config:
    """BYOL with its learned predictor on CIFAR-100."""
    return _cifar_byol("cifar100")


def cifar100_rdm_simsiam() -> Config:
    """SimSiam with a spectral filter (target, sigma -1) on CIFAR-100."""
    return rdm(cifar100_simsiam(), WHITEN)


def cifar100_rdm_byol() -> Config:
    """BYOL with a spectral filter (target, sigma -1) on CIFAR-100."""
    return rdm(cifar100_byol(), WHITEN)


def cifar100_symsimsiam() -> Config:
    """The symmetric control on CIFAR-100."""
    return symmetric(cifar100_simsiam())
