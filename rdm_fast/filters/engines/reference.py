"""The reference engine: the filter as the paper's code computes it, for comparison.

A thin SVD in float32 of the online rows, or of the targets themselves; no cutoff, W is formed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_fast.filters.engines.base import SpectralFilter
from rdm_fast.filters.response import response


@dataclass(eq=False)
class ReferenceFilter(SpectralFilter):
    def __post_init__(self) -> None:
        wide = self.X.to(torch.promote_types(self.X.dtype, torch.float32))
        _, s, Vh = torch.linalg.svd(wide, full_matrices=False)
        g = response(self.config, s, torch.full_like(s[:, :1], -1.0))
        self.W = (Vh.mT * g[:, None, :]) @ Vh

    def cosine(self, p: Tensor, z: Tensor) -> Tensor:
        y, t = p.to(self.W.dtype) @ self.W, z.to(self.W.dtype)
        return -F.cosine_similarity(y, t, dim=-1).mean(dim=-1)

    def filter_batch(self) -> Tensor:
        return self.filter_rows(self.X[:, self.rows])

    def filter_rows(self, z: Tensor) -> Tensor:
        return z.to(self.W.dtype) @ self.W
