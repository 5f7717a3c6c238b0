"""DINO and SwAV on CIFAR, ImageNet-100 and ImageNet.

CIFAR and ImageNet-100: RDM's copies of solo-learn's scripts (bash_files/pretrain/*/dino.sh and
swav.sh) and the defaults of its parsers, for 400 epochs. ImageNet: "ResNet-50" of dino's README and
main_dino.py, and swav's scripts/swav_200ep_bs256_pretrain.sh, whose prototypes are frozen for 5005
steps, an epoch.
"""

from dataclasses import replace

from rdm_fast.config import Config, ModelConfig, PrototypesConfig
from rdm_fast.config.recipes import cifar, imagenet
from rdm_fast.config.recipes.parts import byol_views, lars


def _head(model: ModelConfig, *, dino: bool) -> ModelConfig:
    head = replace(
        model,
        zero_init_residual=False,
        projector_hidden=2048,
        projector_bn=False,
        projector_layers=3 if dino else 2,
        projector_dim=256 if dino else 128,
    )
    return replace(head, projector_activation="gelu", projector_hidden_bn=False) if dino else head


def _dino(config: Config, blur1: float, blur2: float) -> Config:
    """From SimSiam's data, with LARS, and the blur of each view."""
    optim = replace(
        lars(config.optim), base_lr=0.3, weight_decay=1e-6, ema_start=0.9995, ema_end=1.0
    )
    return replace(
        config,
        method="dino",
        predictor="none",
        augment=byol_views(config.augment, blur1, blur2),
        model=_head(config.model, dino=True),
        optim=optim,
        prototypes=PrototypesConfig(count=4096, teacher_temp=0.07, teacher_temp_epochs=50),
    )


def _swav(config: Config) -> Config:
    view = replace(config.augment.view1, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    optim = replace(
        lars(config.optim),
        base_lr=0.6,
        final_lr=6e-4,
        weight_decay=1e-6,
        decay_norm_and_bias=True,
    )
    prototypes = PrototypesConfig(
        count=3000, frozen_epochs=2, centring="sinkhorn", queue=3840, queue_epoch=50
    )
    return replace(
        config,
        method="swav",
        predictor="none",
        augment=replace(config.augment, view1=view, view2=view),
        model=_head(config.model, dino=False),
        optim=optim,
        prototypes=prototypes,
    )


def cifar10_dino() -> Config:
    """DINO on CIFAR-10."""
    return _dino(cifar.cifar10_simsiam(), 0.0, 0.0)


def cifar10_swav() -> Config:
    """SwAV on CIFAR-10."""
    return _swav(cifar.cifar10_simsiam())


def cifar100_dino() -> Config:
    """DINO on CIFAR-100."""
    return _dino(cifar.cifar100_simsiam(), 0.0, 0.0)


def cifar100_swav() -> Config:
    """SwAV on CIFAR-100."""
    return _swav(cifar.cifar100_simsiam())


def imagenet100_dino() -> Config:
    """DINO on ImageNet-100, ResNet-18."""
    return _dino(imagenet.imagenet100_simsiam(), 1.0, 0.1)


def imagenet100_swav() -> Config:
    """SwAV on ImageNet-100, ResNet-18."""
    return _swav(imagenet.imagenet100_simsiam())


def imagenet_dino() -> Config:
    """DINO on ImageNet, ResNet-50, 100 epochs, with eight small views."""
    config = imagenet.imagenet_simsiam()
    dino = _dino(config, 1.0, 0.1)
    view1, view2 = (replace(v, crop_scale=(0.14, 1.0)) for v in dino.augment.views[:2])
    augment = replace(
        dino.augment, view1=view1, view2=view2, interpolation="bicubic", small_views=8,
        small_blur=0.5,
    )  # fmt: skip
    optim = replace(
        config.optim,
        base_lr=0.03,
        warmup_epochs=10,
        warmup_lr=0.0,
        final_lr=1e-6,
        decay_norm_and_bias=False,
        fixed_predictor_lr=False,
        clip_each=3.0,
        ema_start=0.996,
    )
    return replace(
        dino,
        augment=augment,
        optim=optim,
        prototypes=PrototypesConfig(count=65_536),
    )


def imagenet_swav() -> Config:
    """SwAV on ImageNet, ResNet-50, 200 epochs, with six small views."""
    config = imagenet.imagenet_simsiam()
    config = _swav(replace(config, optim=replace(config.optim, global_batch=256)))
    view = replace(config.augment.view1, crop_scale=(0.14, 1.0))
    augment = replace(
        config.augment, view1=view, view2=view, small_views=6, std=(0.228, 0.224, 0.225)
    )
    optim = replace(config.optim, epochs=200, warmup_epochs=0, lars_eta=1e-3, lars_clip=False)
    prototypes = replace(config.prototypes, frozen_epochs=1, queue_epoch=15)
    return replace(config, augment=augment, optim=optim, prototypes=prototypes)
