"""Singular values and right singular vectors of a batch, from the smaller of its Gram matrices.

    samples, X X^T = U S^2 U^T [B, B]     features, X^T X = V S^2 V^T [D, D]     X = U S V^T

Formed and solved in float64: squaring the singular values costs half the digits, and float32 has
not enough for a cutoff of 1e-4. The sample side needs no V: it is V = X^T (U / S).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.filters.gram import WIDE, gram_matrix
from rdm_fast.filters.response import cutoff, response
from rdm_kernels import Eigh, safe_eigh


@dataclass(frozen=True)
class Decomposition:
    """Spectrum of a batch X = U S V^T from its smaller side, and the filter's response on it."""

    s: Tensor  # singular values, [v, n] float64, ascending
    g: Tensor  # response, [v, n] float64; 0 where cut off, NaN where X is not finite
    vectors: Tensor  # [v, n, n] float64: columns of U on the sample side, of V on the feature side

    @property
    def U_over_S(self) -> Tensor:
        """U / S on the sample side, [v, B, n]; zero where cut off."""
        inverse = (self.g != 0) / self.s.where(self.g != 0, 1)
        return self.vectors * inverse[:, None, :]

    def V(self, X: Tensor) -> Tensor:
        """V [v, D, n] of the batch X [v, B, D]; on the sample side, zero where cut off."""
        return X.to(WIDE).mT @ self.U_over_S if uses_samples(*X.shape[1:]) else self.vectors


def uses_samples(B: int, D: int) -> bool:
    """Whether the Gram matrix of the samples is the smaller one."""
    return B <= D


def smaller_gram(X: Tensor) -> Tensor:
    """X X^T or X^T X, whichever is smaller, [v, n, n] float64, for X [v, B, D]."""
    return gram_matrix(X, samples=uses_samples(*X.shape[1:]), wide=True)


def center_samples(G: Tensor) -> Tensor:
    """Gram matrix of the centered rows, from that of the rows: H G H, H = I - 11^T / B."""
    mean = G.mean(dim=-1, keepdim=True)
    return G - mean - mean.mT + mean.mean(dim=-2, keepdim=True)


def eigen_of_gram(G: Tensor) -> Eigh:
    """Eigenvalues and vectors of positive semi-definite matrices, [v, n, n] float64."""
    return safe_eigh(G, non_negative=True)


def respond(eigen: Eigh, X: Tensor, config: FilterConfig) -> Decomposition:
    """The filter's response on the spectrum of a Gram matrix of X.

    Args:
        eigen: of a Gram matrix of X (of the centered X if config.center).
        X: [v, B, D]; gives the sizes, and the dtype whose noise is cut off.
        config: the filter.
    """
    s = eigen.eigenvalues.sqrt()
    _, B, D = X.shape
    tau = cutoff(s, samples=B, features=D, dtype=X.dtype, relative=config.cutoff)
    g = response(config, s, tau).where(eigen.finite[:, None], torch.nan)
    return Decomposition(s, g, eigen.vectors)


@torch.no_grad()
def right_vectors(X: Tensor, config: FilterConfig) -> tuple[Tensor, Tensor]:
    """V [v, D, n] and the response g [v, n] of a global batch X [v, B, D], float64.

    On the sample side the columns of directions that are cut off are zero, as is their g.
    """
    wide = X.to(WIDE)
    wide = wide - wide.mean(dim=1, keepdim=True) if config.center else wide
    spectrum = respond(eigen_of_gram(smaller_gram(wide)), X, config)
    return spectrum.V(wide), spectrum.g
