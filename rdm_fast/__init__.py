"""rdm-fast: fast self-supervised learning with spectral filters.

    from rdm_fast import FilterConfig, SpectralPredictor, spectral_loss

Importing the package does not import torch, so a command line is checked at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdm_fast.config import FilterConfig
    from rdm_fast.filters.loss import SpectralPredictor, spectral_loss
    from rdm_fast.models.pretrained import load_backbone
    from rdm_fast.spectrum import effective_rank, rank_difference

__version__ = "0.1.0"

__all__ = [
    "FilterConfig",
    "SpectralPredictor",
    "effective_rank",
    "load_backbone",
    "rank_difference",
    "spectral_loss",
]

_ROOM = {
    "FilterConfig": "config",
    "SpectralPredictor": "filters.loss",
    "spectral_loss": "filters.loss",
    "load_backbone": "models.pretrained",
    "effective_rank": "spectrum",
    "rank_difference": "spectrum",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOM:
        raise AttributeError(f"module 'rdm_fast' has no attribute {name!r}")
    return getattr(import_module(f"rdm_fast.{_ROOM[name]}"), name)
