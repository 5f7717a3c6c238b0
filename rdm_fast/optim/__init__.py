"""Optimizers: SGD, LARS and AdamW, NVIDIA apex's; parameter groups; warm-up and cosine."""

from rdm_fast.optim.frozen import undone_where
from rdm_fast.optim.lars import Lars
from rdm_fast.optim.optimizers import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    set_learning_rate,
    state_keys,
)

__all__ = [
    "Lars",
    "build_optimizer",
    "learning_rate",
    "parameter_groups",
    "set_learning_rate",
    "state_keys",
    "undone_where",
]
