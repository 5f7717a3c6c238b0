"""Recipes for the embedded digits, about a minute each on two CPU cores."""

from dataclasses import replace

from rdm_fast.config import (
    AugmentConfig,
    Config,
    DataConfig,
    GuardConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PrototypesConfig,
    ViewConfig,
)
from rdm_fast.config.recipes.parts import ADAMW, LOW_PASS, WHITEN, rdm, symmetric


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
    return rdm(digits_byol(), LOW_PASS)


def digits_symsimsiam() -> Config:
    """The symmetric control, without predictor or stop-gradient, on the embedded digits."""
    return symmetric(_digits())


RANKS_FALL_FIRST = GuardConfig(warmup=0.3)
"""With prototypes, ranks fall for some epochs, and rise from then on."""


def digits_dino() -> Config:
    """DINO on the embedded digits, with AdamW; so small a network needs batch norm in its head."""
    config = _digits()
    model = replace(config.model, projector_dim=64, projector_bn=False, projector_activation="gelu")
    return replace(
        config,
        method="dino",
        predictor="none",
        model=model,
        optim=replace(
            ADAMW, epochs=60, global_batch=200, base_lr=2.5e-3, warmup_epochs=6, ema_start=0.95
        ),
        log=replace(config.log, spectrum_every=35),
        prototypes=PrototypesConfig(count=512, frozen_epochs=1),
        guard=RANKS_FALL_FIRST,
    )


def digits_swav() -> Config:
    """SwAV on the embedded digits."""
    config = _digits()
    model = replace(config.model, projector_layers=2, projector_dim=64, projector_bn=False)
    return replace(
        config,
        method="swav",
        predictor="none",
        model=model,
        log=replace(config.log, spectrum_every=35),
        prototypes=PrototypesConfig(count=512, frozen_epochs=1, centring="sinkhorn"),
        guard=RANKS_FALL_FIRST,
    )
