"""The gemm engine: matrix products only, no eigendecomposition, and nothing waits for the device.

    samples     X W = M Y,     W = Y^T R Y,   K = Y Y^T
    features    X W = Y^T M,   W = R

    g        samples                                          features
    s^2      Y = X,    M = X X^T / unit,  R = 1 / unit        Y = X^T,    M = R = X^T X / unit
    others   Y = Q X,  M = K E,           R = F               Y = Q X^T,  M = K E,  R = K F

Q, E and F are those of `rdm_kernels.filter_factors`, which damps singular values under tau =
max(cutoff, 1e-3) |X| (or under the rounding noise of the projections) where the eigh engine cuts
them off; the rounding of a float32 Gram matrix hides weaker ones.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, overload

import torch
from torch import Tensor

from rdm_fast.filters.decomposition import uses_samples
from rdm_fast.filters.engines.base import SpectralFilter, combine_rows, row_norms
from rdm_fast.filters.engines.split_views import split_views_across_ranks
from rdm_fast.filters.gram import gram_and_swapped, gram_matrix, inner_products
from rdm_fast.filters.response import g, noise_share
from rdm_kernels import FilterFactors, filter_factors, filtered_cosine, product, sym_matmul

LEAST_CUTOFF = 1e-3


class Form(NamedTuple):
    """The matrices and factors of the module's first lines."""

    M: Tensor  # [v, n, n], n the smaller of B and D; not divided by the unit yet
    Y: Tensor  # [v, n, m], m the larger
    K: Tensor  # [v, n, n]
    R: Tensor | None  # [v, n, n]; None: the identity
    unit: Tensor | None = None  # [v]; None: 1
    inner: Tensor | None = None  # z Y^T of the swapped rows, if it is known


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
        self.is_square = self.config.kind == "poly" and self.config.sigma == 2

    @property
    def status(self) -> Tensor | None:
        return None if self.is_square else self._factors.status

    @property
    def scale(self) -> Tensor | float:
        if self.is_square or self.config.kind != "poly":
            return 1.0
        factors = self._factors
        rms = (factors.trace / factors.K.shape[1]).sqrt()
        return (factors.root / rms).where(rms > 0, 1) ** self.config.sigma

    def cosine(self, p: Tensor, z: Tensor) -> Tensor:
        norm, f = row_norms(z, self.dtype), self._form
        if self.samples:
            alpha, inner = f.M[:, self.rows], self._inner(z) if f.inner is None else f.inner
            return filtered_cosine(
                p, norm, alpha, product(alpha, f.K), inner, f.R, f.Y, unit=f.unit
            )
        y = self._own_rows()
        return filtered_cosine(p, norm, y, y, z.to(self.dtype), f.R)

    def filter_batch(self) -> Tensor:
        f = self._form
        if self.samples:
            return combine_rows(f.M[:, self.rows], f.Y, reciprocal(f.unit))
        return self._own_rows()

    def filter_rows(self, z: Tensor) -> Tensor:
        f = self._form
        if self.samples:
            inner = self._inner(z)
            N = inner if f.R is None else product(inner, f.R)
            return combine_rows(N, f.Y, reciprocal(f.unit))
        assert f.R is not None
        return product(z.to(self.dtype), f.R)

    def _own_rows(self) -> Tensor:
        """X W on the feature side, this rank's rows."""
        return product(self._form.Y.mT[:, self.rows].to(self.dtype), self._form.M)

    def _inner(self, z: Tensor) -> Tensor:
        Y = self._form.Y
        return inner_products(z.to(Y.dtype), Y, wide=False)

    @cached_property
    def _form(self) -> Form:
        if self.is_square:
            return self._square
        Y, K, F, E, *_ = self._factors
        M = sym_matmul(K, E).matrix
        return Form(M, Y, K, F if self.samples else sym_matmul(K, F).matrix)

    @property
    def _square(self) -> Form:
        inner = None
        if self.samples and self.swapped:
            G, inner = gram_and_swapped(self.X, wide=False)
        else:
            G = gram_matrix(self.X, samples=self.samples, wide=False)
        unit = G.diagonal(dim1=-2, dim2=-1).mean(dim=-1)  # s_rms^2
        if self.samples:
            return Form(G, self.X, G, None, unit, inner)
        M = reciprocal(unit)[:, None, None] * G
        return Form(M, self.X.mT, G, M)

    @cached_property
    def _factors(self) -> FilterFactors:
        config, (_, B, D) = self.config, self.X.shape
        response = config.sigma if config.kind == "poly" else partial(g, config)
        factors = partial(
            filter_factors,
            g=response,
            cutoff=max(config.cutoff, LEAST_CUTOFF),
            noise=noise_share(samples=B, features=D, dtype=self.X.dtype),
        )
        return split_views_across_ranks(factors, self.X)
