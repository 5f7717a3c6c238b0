"""The eigh engine: V and S of the batch, and everything in the coordinates of V.

    p V, z V [v, b, n]     online: y = p W has coordinates g pV     target: z W has g zV

On the sample side V^T = (U / S)^T X, so coordinates are inner products with X times U / S, and the
way back to rows costs one product with X. Directions under the cutoff are left out. All is float64
except that last product, which amplifies rounding by no more than s_max / s.
"""

from dataclasses import dataclass

from torch import Tensor

from rdm_fast.filters.decomposition import center_samples, eigen_of_gram, respond, uses_samples
from rdm_fast.filters.engines.base import SpectralFilter, combine_rows, power_of_rms, row_norms
from rdm_fast.filters.engines.split_views import split_views_across_ranks
from rdm_fast.filters.gram import WIDE, gram_and_swapped, gram_matrix, inner_products
from rdm_kernels import filtered_cosine


@dataclass(eq=False)
class EighFilter(SpectralFilter):
    def __post_init__(self) -> None:
        X, center = self.X, self.config.center
        self.samples = uses_samples(*X.shape[1:])
        self.inner: Tensor | None = None  # z X^T of the swapped rows
        if self.samples and self.swapped:
            self.G, self.inner = gram_and_swapped(X, wide=True)
        elif self.samples or not center:
            self.G = gram_matrix(X, samples=self.samples, wide=True)
        else:
            wide = X.to(WIDE)
            self.G = gram_matrix(wide - wide.mean(dim=1, keepdim=True), samples=False, wide=True)
        centered = center_samples(self.G) if self.samples and center else self.G
        eigen = split_views_across_ranks(eigen_of_gram, centered)
        self.spectrum = respond(eigen, X, self.config)
        self.g = self.spectrum.g[:, None, :]
        if self.samples:
            self.U_over_S = self.spectrum.U_over_S

    @property
    def scale(self) -> Tensor | float:
        s = self.spectrum.s
        return power_of_rms(self.config, s, s.amax(dim=-1))

    def cosine(self, p: Tensor, z: Tensor) -> Tensor:
        y = self.g * self._batch_coordinates()
        t = self._coordinates(z, self.inner)
        back = (self.U_over_S if self.samples else self.spectrum.vectors) * self.g
        X = self.X if self.samples else None
        return filtered_cosine(p, row_norms(z, WIDE), y, y, t, back.mT, X)

    def filter_batch(self) -> Tensor:
        return self._to_rows(self.g * self._batch_coordinates())

    def filter_rows(self, z: Tensor) -> Tensor:
        return self._to_rows(self.g * self._coordinates(z))

    def _batch_coordinates(self) -> Tensor:
        """X V, this rank's rows, [v, b, n]."""
        if not self.samples:
            return self.X[:, self.rows].to(WIDE) @ self.spectrum.vectors
        if self.config.center:  # V is of the centered rows, X is not centered
            return self.G[:, self.rows] @ self.U_over_S
        return self.spectrum.vectors[:, self.rows] * self.spectrum.s[:, None, :]

    def _coordinates(self, z: Tensor, inner: Tensor | None = None) -> Tensor:
        """z V, [v, b, n]; inner is z X^T, if it is known."""
        if not self.samples:
            return z.to(WIDE) @ self.spectrum.vectors
        return (inner_products(z, self.X, wide=True) if inner is None else inner) @ self.U_over_S

    def _to_rows(self, coordinates: Tensor) -> Tensor:
        """Rows [v, b, D] with these coordinates."""
        if self.samples:
            return combine_rows(coordinates @ self.U_over_S.mT, self.X)
        rows = coordinates @ self.spectrum.vectors.mT
        return rows if self.X.dtype == WIDE else rows.float()
