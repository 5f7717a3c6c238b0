"""Engines: ways to compute a spectral filter.

eigh        eigendecomposition of the smaller Gram matrix: every filter, always accurate
gemm        matrix products only: where they are accurate, and nothing waits for the device
reference   as the paper's released code, for comparison
"""

from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.filters.engines.base import SpectralFilter
from rdm_fast.filters.engines.choice import EngineSelector
from rdm_fast.filters.engines.eigh import EighFilter
from rdm_fast.filters.engines.gemm import GemmFilter
from rdm_fast.filters.engines.reference import ReferenceFilter

__all__ = ["EngineSelector", "SpectralFilter", "build_filter"]

ENGINES: dict[str, type[SpectralFilter]] = {
    "eigh": EighFilter,
    "gemm": GemmFilter,
    "reference": ReferenceFilter,
}


def build_filter(
    engine: str, X: Tensor, rows: slice, config: FilterConfig, *, swapped: bool = False
) -> SpectralFilter:
    """The spectral filter of a global batch X [v, B, D] by the engine of this name."""
    return ENGINES[engine](X.detach(), rows, config, swapped)
