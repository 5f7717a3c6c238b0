"""Along which directions: the measured response of a predictor, and alignment of eigenspaces.

Directions are the right singular vectors v_i of a batch of projections Z = U S V^T, which are the
eigenvectors of its correlation matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.filters.decomposition import decompose, smaller_gram, uses_samples

ALL_BUT = 1e-4
"""Share of the variance outside the top eigenvectors: the paper's figure 4 shows 99.99 %."""
KEEP = FilterConfig(sigma=0.0)
"""g = 1 above the cutoff and 0 under it: which directions are more than noise."""


@dataclass(frozen=True)
class Directions:
    """Right singular vectors of a batch, strongest first."""

    s: Tensor  # singular values, [n] float64, n = min(B, D)
    V: Tensor  # [D, n] float64; columns of directions under the cutoff are zero
    kept: Tensor  # [n] bool: above the cutoff


def directions(z: Tensor) -> Directions:
    """The directions of a batch z [B, D]; all NaN and none kept if it is not finite."""
    X = z[None]
    spectrum = decompose(smaller_gram(X), X, KEEP)
    if uses_samples(*z.shape):
        V = z.to(torch.float64).mT @ spectrum.U_over_S[0]
    else:
        V = spectrum.vectors[0]
    kept = spectrum.g[0] == 1
    return Directions(spectrum.s[0].flip(0), (V * kept).flip(1), kept.flip(0))


def measured_response(z: Tensor, p: Tensor, axes: Directions | None = None) -> Tensor:
    """By what a predictor scales each direction of the projections: g read off from its rows.

        g(s_i) = v_i^T (Z^+ P) v_i = (Z v_i)^T (P v_i) / |Z v_i|^2

    the slope of the prediction's i-th coordinate on the projection's: of the best linear map from
    Z to P (least squares), the entry at v_i. Any module can be looked at so, an MLP or a spectral
    filter (whose g(s) it gives back exactly): the paper's figure 4 shows such curves, without
    saying by which estimator.

    Args:
        z: projections, [B, D].
        p: what the predictor made of them, [B, D].
        axes: `directions(z)`, if they are known.

    Returns:
        [min(B, D)] float64, for the strongest direction first; NaN for those under the cutoff.
    """
    axes = directions(z) if axes is None else axes
    onto = z.to(torch.float64) @ axes.V
    made = p.to(torch.float64) @ axes.V
    g = (onto * made).sum(dim=0) / onto.square().sum(dim=0)
    return g.where(axes.kept, torch.nan)


def alignment(online: Tensor, axes: Directions) -> Tensor:
    """How far the eigenvectors of one branch are those of the other's correlation matrix C.

        mean_i cos(C v_i, v_i)

    over the v_i that carry 99.99 % of their batch's variance; 1 if all are eigenvectors of C.
    This is the alignment of eigenspaces that follow-up code attributes to the RDM paper, whose
    own released code has none.

    Args:
        online: rows [B, D] whose correlation matrix C is.
        axes: the v_i, of the other branch's batch.

    Returns:
        Scalar float64.
    """
    variance = axes.s.square()
    before = variance.cumsum(dim=0) - variance  # carried by the stronger ones
    top = axes.kept & (before < (1 - ALL_BUT) * variance.sum())
    rows = online.to(torch.float64)
    onto = rows @ axes.V
    turned = rows.mT @ onto  # B C v_i, one a column
    cosine = onto.square().sum(dim=0) / turned.norm(dim=0).clamp_min(torch.finfo(rows.dtype).tiny)
    return (cosine * top).sum() / top.sum()
