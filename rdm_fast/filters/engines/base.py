"""The interface of an engine: the spectral filter of a batch, as operations on rows."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_kernels.apply_rows import apply_rows


@dataclass(eq=False)
class SpectralFilter(ABC):
    """W = V g(S) V^T of a global batch X = U S V^T; it carries no gradient.

    Results are float32, or float64 for float64 batches, and NaN where X is not finite.
    """

    X: Tensor  # the global batch, [v, B, D], without gradient
    rows: slice  # this rank's rows of it
    config: FilterConfig
    swapped: bool = False
    """`cosine` will be called with the other view's rows as targets, all of them on this rank."""

    @property
    def status(self) -> Tensor | None:
        """[v] int32, of `rdm_kernels.filter_factors`; None for an engine that cannot fail."""
        return None

    @property
    def scale(self) -> Tensor | float:
        """Factor, [v] or 1, from W to that of (s / s_rms)^sigma if kind=poly; cosines need none."""
        return 1.0

    @abstractmethod
    def cosine(self, p: Tensor, z: Tensor) -> Tensor:
        """Mean negative cosine of each view, [v], between p W and z.

        Args:
            p: this rank's rows of X, [v, b, D]; takes the gradient.
            z: target rows, likewise; no gradient.
        """

    @abstractmethod
    def filter_batch(self) -> Tensor:
        """X W, this rank's rows, [v, b, D]."""

    @abstractmethod
    def filter_rows(self, z: Tensor) -> Tensor:
        """z W for any other rows z, [v, b, D]."""


def power_of_rms(config: FilterConfig, s: Tensor, unit: Tensor | float) -> Tensor | float:
    """(unit / s_rms)^sigma, [v], for s [v, n]: from (s / unit)^sigma to s_rms; 1 for other g."""
    if config.kind != "poly":
        return 1.0
    rms = s.square().mean(dim=-1).sqrt()
    return (unit / rms).where(rms > 0, 1) ** config.sigma


def row_norms(z: Tensor, dtype: torch.dtype) -> Tensor:
    """|z_i|, [v, b], computed in this dtype."""
    return torch.linalg.vector_norm(z, dim=-1, dtype=dtype)


def combine_rows(N: Tensor, X: Tensor, scale: Tensor | None = None) -> Tensor:
    """scale N X, [v, b, D] in float32 or float64, for N [v, b, B], X [v, B, D] and scale [v]."""
    scale = torch.ones(len(X), dtype=N.dtype, device=N.device) if scale is None else scale
    return apply_rows(N, X, scale, None, torch.promote_types(X.dtype, torch.float32))
