"""The gemm engine: matrix products only, no eigendecomposition, and nothing waits for the device.

    samples, G = X X^T      W = X^T h X, X W = M X         h = g(sqrt G) / G, M = G h
    features, F = X^T X     W = g(sqrt F)

The functions of G come from `rdm_kernels.matrix_function`, which damps singular values under
tau = max(cutoff, 1e-3) |X| (or under the rounding noise of the projections) where the eigh engine
cuts them off; the rounding of a float32 Gram matrix hides weaker ones. s^2 needs no matrix
function: h = 1, or W = F. The target of s^-1 is, apart from the damping, the polar factor of its
batch; without damping (`rdm_kernels.polar`) a collapsed batch's targets would be mostly rounding
noise.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, overload

import torch
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.filters.decomposition import uses_samples
from rdm_fast.filters.engines.base import SpectralFilter, combine_rows, row_norms
from rdm_fast.filters.engines.split_views import split_views_across_ranks
from rdm_fast.filters.gram import WIDE, gram_and_swapped, gram_matrix, inner_products
from rdm_fast.filters.response import g, noise_floor
from rdm_kernels import MatrixFunction, filtered_cosine, matrix_function, product

LEAST_CUTOFF = 1e-3
FALLING_DEGREE = 200  # of the Chebyshev series: s^-1 to 1e-7 of its maximum, at this cutoff


def needs_float64(config: FilterConfig) -> bool:
    """Whether h = g / s^2 amplifies directions so weak that a float32 Gram matrix lacks them.

    X W = M X of a target does not use h.
    """
    uses_h = config.location == "online" or config.basis == "online"
    return uses_h and (config.kind == "log" or config.is_falling)


class Functions(NamedTuple):
    """Functions of the Gram matrix G, [v, n, n] each."""

    M: Tensor  # G h on the sample side, W on the feature side; both times the unit, if there is one
    h: Tensor | None  # None: the identity divided by the unit
    unit: Tensor | None  # [v]
    status: Tensor | None  # [v], of `rdm_kernels.matrix_function`


@overload
def reciprocal(unit: Tensor) -> Tensor: ...
@overload
def reciprocal(unit: None) -> None: ...
def reciprocal(unit: Tensor | None) -> Tensor | None:
    """1 / unit, finite for 0."""
    return None if unit is None else unit.clamp_min(torch.finfo(unit.dtype).tiny).reciprocal()


@dataclass(eq=False)
class GemmFilter(SpectralFilter):
    def __post_init__(self) -> None:
        self.samples = uses_samples(*self.X.shape[1:])
        self.dtype = torch.promote_types(self.X.dtype, torch.float32)
        self.exact = self.X  # the batch as Gram matrices take it
        if needs_float64(self.config):
            self.dtype, self.exact = WIDE, self.X.to(WIDE)

    @property
    def status(self) -> Tensor | None:
        return self._functions.status

    def cosine(self, p: Tensor, z: Tensor) -> Tensor:
        norm = row_norms(z, self.dtype)
        M, h, unit, _ = self._functions
        if not self.samples:
            y = product(self.X[:, self.rows].to(self.dtype), M)
            return filtered_cosine(p, norm, y, y, z.to(self.dtype), M)
        G, inner = self._gram
        M = M[:, self.rows]
        inner = self._inner(z) if inner is None else inner
        return filtered_cosine(p, norm, M, product(M, G), inner, h, self.X, unit=unit)

    def filter_batch(self) -> Tensor:
        M, _, unit, _ = self._functions
        if self.samples:
            return combine_rows(M[:, self.rows], self.X, reciprocal(unit))
        return product(self.X[:, self.rows].to(self.dtype), M)

    def filter_rows(self, z: Tensor) -> Tensor:
        M, h, unit, _ = self._functions
        if not self.samples:
            return product(z.to(self.dtype), M)
        inner = self._inner(z)
        N = inner if h is None else product(inner, h)
        return combine_rows(N, self.X, reciprocal(unit))

    @cached_property
    def _gram(self) -> tuple[Tensor, Tensor | None]:
        """The smaller Gram matrix [v, n, n], and z X^T of the swapped rows if it came with it."""
        if self.samples and self.swapped:
            return gram_and_swapped(self.exact, wide=False)
        return gram_matrix(self.exact, samples=self.samples, wide=False), None

    @cached_property
    def _functions(self) -> Functions:
        G, _ = self._gram
        square = G.diagonal(dim1=-2, dim2=-1).mean(dim=-1)  # of s_rms
        if self._is_power(2):
            if self.samples:
                return Functions(G, None, square, None)
            return Functions(reciprocal(square)[:, None, None] * G, None, None, None)
        s_rms = square.sqrt()
        result = split_views_across_ranks(self._matrix_function, G, s_rms)
        return Functions(result.M, result.h, None, result.status)

    def _matrix_function(self, G: Tensor, s_rms: Tensor) -> MatrixFunction:
        """Degree 1 is exact for s^0 and s^1; None lets the op choose one for a rising g."""
        _, B, D = self.X.shape
        rms = s_rms / max(B, D) ** 0.5
        floor = noise_floor(rms, samples=B, features=D, dtype=self.X.dtype)
        unit = s_rms.where(s_rms > 0, 1)[:, None] if self.config.kind == "poly" else 1
        degree = FALLING_DEGREE if self.config.is_falling else None
        degree = 1 if self._is_power(0) or self._is_power(1) else degree
        cutoff = max(self.config.cutoff, LEAST_CUTOFF)
        return matrix_function(
            G, lambda s: g(self.config, s / unit), cutoff=cutoff, floor=floor, degree=degree
        )

    def _is_power(self, sigma: float) -> bool:
        return self.config.kind == "poly" and self.config.sigma == sigma

    def _inner(self, z: Tensor) -> Tensor:
        return inner_products(z.to(self.exact.dtype), self.exact, wide=False)
