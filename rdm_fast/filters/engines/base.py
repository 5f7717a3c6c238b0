"""What every engine makes of a batch: its spectral filter, as operations on rows."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_kernels.apply_rows import apply_rows


class SpectralFilter(ABC):
    """W = V g(S) V^T of a global batch X = U S V^T [v, B, D]; it carries no gradient.

    Results are in float32, or float64 for float64 batches. Where X is not finite they are NaN.
    """

    def __init__(
        self, X: Tensor, rows: slice, config: FilterConfig, *, swapped: bool = False
    ) -> None:
        """
        Args:
            X: the global batch, without gradient.
            rows: this rank's rows of it.
            config: which filter.
            swapped: `cosine` will be asked for targets that are the other view's rows, and all
                of them are on this rank.
        """
        self.X, self.rows, self.config, self.swapped = X, rows, config, swapped

    status: Tensor | None = None
    """[v] int32, of `rdm_kernels.matrix_function`; None for an engine that cannot fail."""

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


def row_norms(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Norm of each row, [v, b], computed in this dtype."""
    return torch.linalg.vector_norm(z, dim=-1, dtype=dtype)


def combine_rows(N: Tensor, X: Tensor) -> Tensor:
    """N X, [v, b, D] in float32 or float64, for N [v, b, B] and a batch X [v, B, D]."""
    one = torch.ones(len(X), dtype=N.dtype, device=N.device)
    return apply_rows(N, X, one, one, torch.promote_types(X.dtype, torch.float32))
