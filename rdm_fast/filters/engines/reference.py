"""The reference engine: the filter as the paper's released code computes it, for comparison.

    basis=own      its code for CIFAR and ImageNet-100, X = U S V^T by a thin SVD in float32
                   online   p V diag(g(S)) V^T            target   U diag(S g(S)) V^T
    basis=online   its code for ImageNet, V and S of the online batch X
                   target   z V diag(g(S)) V^T
                   For B >= D they come from an eigendecomposition of X^T X, and where rounding has
                   made an eigenvalue negative, its root is NaN.

Nothing is cut off, g is not scaled, and W is formed. The first code runs under float16 autocast, so
for float16 batches the operands and results of products are float16. Products are float32 for other
dtypes, which it does not support, and with basis=online.

Two things differ from the released code: targets take g of `filter.kind`, where it takes s^sigma
for any kind, and an online filter with B >= D comes from an SVD on ImageNet, too.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_fast.filters.engines.base import SpectralFilter, power_of_rms
from rdm_fast.filters.response import g


@dataclass(eq=False)
class ReferenceFilter(SpectralFilter):
    def __post_init__(self) -> None:
        self.dtype = torch.promote_types(self.X.dtype, torch.float32)
        by_online = self.config.basis == "online"
        narrow = self.X.dtype == torch.float16 and not by_online
        self.operands = torch.float16 if narrow else self.dtype
        X = self.X.to(self.dtype)
        if by_online and X.shape[1] >= X.shape[2]:
            eigenvalues, V = torch.linalg.eigh(X.mT @ X)
            self.s, self.Vh = eigenvalues.sqrt(), V.mT
        else:
            self.U, self.s, self.Vh = torch.linalg.svd(X, full_matrices=False)

    @property
    def scale(self) -> Tensor | float:
        return power_of_rms(self.config, self.s, 1.0)

    def cosine(self, p: Tensor, z: Tensor) -> Tensor:
        y, t = self.filter_rows(p), z.to(self.dtype)
        return -F.cosine_similarity(y, t, dim=-1).mean(dim=-1)

    def filter_batch(self) -> Tensor:
        if self.config.location == "online":
            return self.filter_rows(self.X[:, self.rows])
        config = self.config
        gains = self.s ** (1 + config.sigma) if config.kind == "poly" else self.s * self._g()
        return self._between(self.U[:, self.rows], gains).to(self.dtype)

    def filter_rows(self, z: Tensor) -> Tensor:
        return (z.to(self.operands) @ self._W).to(self.dtype)

    @cached_property
    def _W(self) -> Tensor:
        return self._between(self.Vh.mT, self._g())

    def _g(self) -> Tensor:
        return torch.stack([g(self.config, s) for s in self.s])

    def _between(self, left: Tensor, gains: Tensor) -> Tensor:
        """left diag(gains) V^T."""
        scaled = left.to(self.operands) * gains[:, None, :].to(self.operands)
        return scaled @ self.Vh.to(self.operands)
