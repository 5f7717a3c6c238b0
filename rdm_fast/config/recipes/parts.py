"""What recipes have in common: filters, heads, optimizers."""

from dataclasses import replace

from rdm_fast.config import AugmentConfig, Config, FilterConfig, ModelConfig, OptimConfig

WHITEN = FilterConfig(location="target", sigma=-1.0)
"""The target filter of the released scripts: weights every direction of the target equally."""
LOW_PASS = FilterConfig(location="online", sigma=1.0)
"""The online filter of the released scripts: amplifies strong directions."""

ADAMW = OptimConfig(
    optimizer="adamw",
    decay_norm_and_bias=False,
    fixed_predictor_lr=False,
    warmup_lr=0.0,
    weight_decay=0.1,
)
"""MoCo v3's, but for rate, batch and epochs."""


def rdm(config: Config, spectral: FilterConfig) -> Config:
    return replace(config, predictor="spectral", filter=spectral)


def symmetric(config: Config) -> Config:
    return replace(config, method="symsimsiam", predictor="none")


def byol_heads(model: ModelConfig, predictor_hidden: int = 4096) -> ModelConfig:
    return replace(
        model,
        zero_init_residual=False,
        projector_layers=2,
        projector_hidden=4096,
        projector_dim=256,
        projector_bn=False,
        predictor_hidden=predictor_hidden,
    )


def byol_views(augment: AugmentConfig, blur1: float, blur2: float) -> AugmentConfig:
    """BYOL's two views, which DINO took over: a blur of each, and solarization of the second."""
    view1 = replace(augment.view1, saturation=0.2, blur=blur1)
    return replace(augment, view1=view1, view2=replace(view1, blur=blur2, solarize=0.2))


def lars(optim: OptimConfig) -> OptimConfig:
    return replace(optim, optimizer="lars", decay_norm_and_bias=False, fixed_predictor_lr=False)
