"""Per-direction measures: the response of a predictor, and the alignment of eigenspaces.

Directions are the right singular vectors v_i of a batch of projections Z = U S V^T, which are the
eigenvectors of its correlation matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.filters.decomposition import eigen_of_gram, respond, smaller_gram

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
    spectrum = respond(eigen_of_gram(smaller_gram(X)), X, KEEP)
    kept = spectrum.g[0] == 1
    V = spectrum.V(X)[0] * kept
    return Directions(spectrum.s[0].flip(0), V.flip(1), kept.flip(0))


def measured_response(z: Tensor, p: Tensor, axes: Directions | None = None) -> Tensor:
    """How much a predictor scales each principal direction of the projections.

        g(s_i) = v_i^T (Z^+ P) v_i = (Z v_i)^T (P v_i) / |Z v_i|^2

    is the slope of the prediction's i-th coordinate on the projection's: the entry at v_i of the
    best linear map from Z to P (least squares). It applies to any module, and gives back the g(s)
    of a spectral filter exactly. The paper's figure 4 shows such curves without naming an
    estimator.

    Args:
        z: projections, [B, D].
        p: the predictions made from them, [B, D].
        axes: `directions(z)`, if they are known.

    Returns:
        [min(B, D)] float64, strongest direction first; NaN under the cutoff.
    """
    axes = directions(z) if axes is None else axes
    onto = z.to(torch.float64) @ axes.V
    made = p.to(torch.float64) @ axes.V
    g = (onto * made).sum(dim=0) / onto.square().sum(dim=0)
    return g.where(axes.kept, torch.nan)


def alignment(online: Tensor, axes: Directions) -> Tensor:
    """How close the eigenvectors of one branch are to those of the other's correlation matrix C.

        mean_i cos(C v_i, v_i)

    over the v_i that carry 99.99 % of their batch's variance; 1 if all are eigenvectors of C.
    Follow-up code attributes this measure to the RDM paper; the paper's released code has none.

    Args:
        online: rows [B, D] with correlation matrix C.
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
