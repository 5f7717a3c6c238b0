"""Optimizers: SGD, LARS and AdamW, NVIDIA apex's; parameter groups; schedules; clipping."""

from rdm_fast.optim.clipping import clip_gradients
from rdm_fast.optim.frozen import undone_where
from rdm_fast.optim.lars import Lars
from rdm_fast.optim.layers import layer_decay_groups
from rdm_fast.optim.optimizers import build_optimizer, parameter_groups, state_keys
from rdm_fast.optim.schedules import (
    learning_rate,
    set_learning_rate,
    set_weight_decay,
    weight_decay,
)

__all__ = [
    "Lars",
    "build_optimizer",
    "clip_gradients",
    "layer_decay_groups",
    "learning_rate",
    "parameter_groups",
    "set_learning_rate",
    "set_weight_decay",
    "state_keys",
    "undone_where",
    "weight_decay",
]
