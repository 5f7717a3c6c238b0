"""Singular values and right singular vectors of a batch, from the smaller of its Gram matrices.

    X = U S V^T [B, D]     X X^T = U S^2 U^T [B, B] ("samples")     X^T X = V S^2 V^T [D, D] ("features")

Formed and solved in float64: squaring the singular values costs half the digits, and float32 has
not enough for a cutoff of 1e-3. On the sample side V = X^T U / S need not be formed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.filters import cutoff, response
from rdm_kernels import gram, safe_eigh

WIDE = torch.float64  # squared singular values are accurate to 1e-16 s_max^2
BLOCK = 128  # rows; smaller products waste a processor, larger ones compute more of what is mirrored


@dataclass(frozen=True)
class Decomposition:
    """Spectrum of a batch X = U S V^T from its smaller side, and the filter's response on it."""

    s: Tensor  # singular values, [v, n] float64, ascending
    g: Tensor  # response, [v, n] float64; 0 where cut off, NaN where X is not finite
    vectors: Tensor  # [v, n, n] float64: columns of U on the sample side, of V on the feature side

    @property
    def U_over_S(self) -> Tensor:
        """On the sample side, [v, B, n]: V = X^T (U / S). Zero where cut off."""
        inverse = (self.g != 0) / self.s.where(self.g != 0, 1)
        return self.vectors * inverse[:, None, :]


def uses_samples(B: int, D: int) -> bool:
    """Whether the Gram matrix of the samples is the smaller one."""
    return B <= D


def exact_gram(X: Tensor, *, samples: bool) -> Tensor:
    """X X^T or X^T X of each batch, [v, n, n] float64, for X [v, B, D].

    Products of 16-bit values are exact in float32, so there only sums are rounded, to 6e-8; wider
    values are multiplied and summed in float64.
    """
    if X.dtype.itemsize == 2:
        return gram(X, side="samples" if samples else "features").matrix.to(WIDE)
    X = X.to(WIDE)
    return _lower_products(X if samples else X.mT)


def smaller_gram(X: Tensor) -> Tensor:
    """`exact_gram` of the smaller side."""
    return exact_gram(X, samples=uses_samples(*X.shape[1:]))


def exact_inner(Z: Tensor, X: Tensor) -> Tensor:
    """Inner products of rows, Z X^T, [v, b, B] float64, for Z [v, b, D] and X [v, B, D]."""
    if X.dtype.itemsize == 2 and X.device.type == "cuda":
        return torch.bmm(Z, X.mT, out_dtype=torch.float32).to(WIDE)
    exact = torch.float32 if X.dtype.itemsize == 2 else WIDE
    return (Z.to(exact) @ X.mT.to(exact)).to(WIDE)


def gram_and_swapped(X: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices of two batches X [2, B, D], and of each with the other's rows, [2, B, B].

    One product, [X1; X2] [X1; X2]^T, of which half is mirrored: X_i X_i^T and X_(1-i) X_i^T.
    """
    B = X.shape[1]
    if X.dtype.itemsize == 2:
        K = gram(X, side="samples", stacked=True).matrix[0].to(WIDE)
    else:
        K = _lower_products(X.flatten(0, 1)[None].to(WIDE))[0]
    return torch.stack([K[:B, :B], K[B:, B:]]), torch.stack([K[B:, :B], K[:B, B:]])


def _lower_products(X: Tensor) -> Tensor:
    """X X^T, [v, n, n], of which only blocks at or under the diagonal are multiplied."""
    n = X.shape[1]
    G = X.new_empty(X.shape[0], n, n)
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        G[:, rows, : rows.stop] = X[:, rows] @ X[:, : rows.stop].mT
        G[:, : rows.start, rows] = G[:, rows, : rows.start].mT
    return G


def centre_samples(G: Tensor) -> Tensor:
    """Gram matrix of the centred rows, from that of the rows: H G H, H = I - 11^T / B."""
    mean = G.mean(dim=-1, keepdim=True)
    return G - mean - mean.mT + mean.mean(dim=-2, keepdim=True)


def decompose(G: Tensor, X: Tensor, config: FilterConfig) -> Decomposition:
    """Eigendecomposition of a Gram matrix, and the response.

    Args:
        G: Gram matrix of X (of the centred X if config.center), [v, n, n] float64.
        X: [v, B, D]; gives the sizes and the dtype whose noise is cut off.
        config: the filter.
    """
    eigen = safe_eigh(G, non_negative=True)
    s = eigen.eigenvalues.sqrt()
    _, B, D = X.shape
    tau = cutoff(s, samples=B, features=D, dtype=X.dtype, relative=config.cutoff)
    g = response(config, s, tau).where(eigen.finite[:, None], torch.nan)
    return Decomposition(s, g, eigen.vectors)


@torch.no_grad()
def right_vectors(X: Tensor, config: FilterConfig) -> tuple[Tensor, Tensor]:
    """V [v, D, n] and the response g [v, n] of a global batch X [v, B, D], float64.

    Columns of directions that are cut off are zero on the sample side; their g is zero anyway.
    """
    wide = X.to(WIDE)
    wide = wide - wide.mean(dim=1, keepdim=True) if config.center else wide
    spectrum = decompose(smaller_gram(wide), X, config)
    if uses_samples(*X.shape[1:]):
        return wide.mT @ spectrum.U_over_S, spectrum.g
    return spectrum.vectors, spectrum.g
