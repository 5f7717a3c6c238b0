"""Measures of one batch of rows: eigenvalues, effective rank, standard deviation.

Correlation here is the uncentered second moment, C = mean_b z_b z_b^T, as in the paper's code
(arXiv:2303.02387). It is neither the covariance, which subtracts the mean, nor Barlow Twins'
cross-correlation. Its eigenvalues are s^2 / B for the singular values s of the batch.

A batch of B rows shows at most min(B, D) directions of D, and one less if its rows sum to zero, as
after a batch norm. Eigenvalues are therefore given for min(B, D) directions only, and comparisons
between batches of different sizes use the share of the attainable rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.filters.decomposition import right_vectors, smaller_gram
from rdm_fast.filters.response import cutoff, response

CENTERED = 1e-3
"""A mean row this small beside the others is rounding, even of 16-bit rows, and no direction."""


def eigenvalues(z: Tensor) -> Tensor:
    """Eigenvalues of the correlation matrix of the given rows (no collective).

    Args:
        z: projections, [B, d], any floating dtype.

    Returns:
        [min(B, d)] float64, ascending, non-negative; the others are zero. NaN if z holds a value
        that is not finite.
    """
    return eigenvalues_of_gram(smaller_gram(z[None])[0], z.shape[0])


def eigenvalues_of_gram(G: Tensor, B: int) -> Tensor:
    """The same of the Gram matrix G of B rows, on either side."""
    if not G.isfinite().all():
        return torch.full_like(G[0], torch.nan)
    return torch.linalg.eigvalsh(G).clamp_min(0) / B


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """How many directions a correlation matrix uses: exp of its spectrum's entropy.

    This is Roy & Vetterli (EUSIPCO 2007) applied to C, whose singular values are its eigenvalues,
    as in the RDM paper. RankMe applies it to Z, that is, to their square roots, and so reports a
    larger number.

    Args:
        eigenvalues: of a correlation matrix, [..., n]. Negative ones are rounding errors and
            count as zero.

    Returns:
        [...] in the eigenvalues' dtype, from 1 (one direction) to n (all alike). 0 for a
        spectrum of zeros, which is complete collapse.
    """
    eigenvalues = eigenvalues.clamp_min(0)
    total = eigenvalues.sum(dim=-1, keepdim=True)
    share = eigenvalues / total.where(total != 0, 1)
    entropy = -torch.special.xlogy(share, share).sum(dim=-1)
    return entropy.exp().where(total.squeeze(-1) != 0, 0)


def attainable_rank(z: Tensor) -> Tensor:
    """The largest effective rank that rows like z [B, d] can have, a scalar int64.

        min(B, d), or min(B - 1, d) where the rows sum to zero, up to rounding

    They do after a projector that ends in a batch norm without bias; without the correction such
    rows would have a share of at most 1 - 1 / B, however spread out they are.
    """
    B, d = z.shape
    wide = z.to(torch.float64)
    centered = wide.mean(dim=0).norm() <= CENTERED * wide.norm() / B**0.5
    return torch.tensor(min(B, d), device=z.device).where(~centered, min(B - 1, d))


def rank_difference(online: Tensor, target: Tensor) -> Tensor:
    """Effective rank of the target branch's output minus the online branch's; RDM wants it > 0.

    Args:
        online, target: outputs of the two branches (after any predictor or filter), [B, d].

    Returns:
        Scalar float64.
    """
    return effective_rank(eigenvalues(target)) - effective_rank(eigenvalues(online))


def filtered_eigenvalues(
    z: Tensor, config: FilterConfig, basis: Tensor | None = None, own: Tensor | None = None
) -> Tensor:
    """Eigenvalues of the correlation matrix of z W.

    Args:
        z: [B, d], any floating dtype.
        config: the filter.
        basis: the batch [B, d] whose filter is W; z itself by default. Then, without centering,
            the answer is (s g(s))^2 / B, and neither vectors nor z W are needed.
        own: `eigenvalues(z)`, if they are known.

    Returns:
        [min(B, d)] float64, non-negative; NaN if the input is not finite.
    """
    if basis is not None or config.center:
        return eigenvalues(filtered_rows(z, config, basis))
    B, d = z.shape
    s = ((eigenvalues(z) if own is None else own) * B).sqrt()[None]
    tau = cutoff(s, samples=B, features=d, dtype=z.dtype, relative=config.cutoff)
    return (s * response(config, s, tau))[0].square() / B


def filtered_rows(z: Tensor, config: FilterConfig, basis: Tensor | None = None) -> Tensor:
    """z W, [B, d] float64, with g = (s / s_max)^sigma for kind=poly; arguments as above."""
    V, g = right_vectors((z if basis is None else basis)[None], config)
    return (z.to(torch.float64) @ V[0]) * g[0] @ V[0].mT


def channel_std(z: Tensor) -> Tensor:
    """Mean standard deviation of a channel of z / |z|, times sqrt(d), for z [B, d].

    0 when all rows are alike (complete collapse), about 1 when they fill the sphere (SimSiam,
    figure 2, in units of its 1 / sqrt(d)).
    """
    return F.normalize(z.float(), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5
