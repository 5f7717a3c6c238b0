"""The spectrum of a batch of projections: eigenvalues, effective rank, rank difference.

Correlation here is the uncentred second moment, C = mean_b z_b z_b^T, as the paper's code computes
it (arXiv:2303.02387). It is not the covariance, which subtracts the mean, nor Barlow Twins'
cross-correlation. Its eigenvalues are s^2 / B for the singular values s of the batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.decomposition import decompose, right_vectors, smaller_gram
from rdm_fast.distributed import gather_rows


def eigenvalues(z: Tensor) -> Tensor:
    """Eigenvalues of the correlation matrix of the rows given (no collective).

    Args:
        z: projections, [B, d], any floating dtype.

    Returns:
        [min(B, d)] float64, ascending, non-negative: all that can differ from zero. NaN if z
        holds a value that is not finite.
    """
    G = smaller_gram(z[None])[0]
    if not G.isfinite().all():
        return torch.full_like(G[0], torch.nan)
    return torch.linalg.eigvalsh(G).clamp_min(0) / z.shape[0]


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """How many directions a correlation matrix really uses: exp of its spectrum's entropy.

    Args:
        eigenvalues: of a correlation matrix, [..., n]. Negative ones are rounding error and
            count as zero.

    Returns:
        [...] in the eigenvalues' dtype, from 1 (one direction) to n (all alike). 0 for a
        spectrum of zeros, which is complete collapse.

    This is Roy & Vetterli (EUSIPCO 2007) applied to C, whose singular values are its eigenvalues,
    as in the RDM paper. RankMe applies it to Z itself, that is to their square roots, and so
    reports a larger number.
    """
    eigenvalues = eigenvalues.clamp_min(0)
    total = eigenvalues.sum(dim=-1, keepdim=True)
    share = eigenvalues / total.where(total != 0, 1)
    entropy = -torch.special.xlogy(share, share).sum(dim=-1)
    return entropy.exp().where(total.squeeze(-1) != 0, 0)


def rank_difference(online: Tensor, target: Tensor) -> Tensor:
    """Effective rank of the target branch's output minus the online branch's; RDM wants it > 0.

    Args:
        online, target: outputs of the two branches (after any predictor or filter), [B, d].

    Returns:
        Scalar float64.
    """
    return effective_rank(eigenvalues(target)) - effective_rank(eigenvalues(online))


def filtered_eigenvalues(z: Tensor, config: FilterConfig, basis: Tensor | None = None) -> Tensor:
    """Eigenvalues of the correlation matrix of z W.

    Args:
        z: [B, d], any floating dtype.
        config: the filter.
        basis: the batch [B, d] whose filter W is; z itself if left out. Then, without centring,
            the answer is (s g(s))^2 / B and z W need not be formed.

    Returns:
        [min(B, d)] float64, non-negative; NaN if the input is not finite.
    """
    if basis is None and not config.center:
        spectrum = decompose(smaller_gram(z[None]), z[None], config)
        return (spectrum.s * spectrum.g)[0].square() / z.shape[0]
    V, g = right_vectors((z if basis is None else basis)[None], config)
    return eigenvalues((z.to(torch.float64) @ V[0]) * g[0])  # V^T after it turns, and no more


def channel_std(z: Tensor) -> Tensor:
    """Mean standard deviation of a channel of z / |z|, times sqrt(d).

    0 when all rows are alike (complete collapse), about 1 when they fill the sphere (SimSiam,
    figure 2, in units of its 1 / sqrt(d)).

    Args:
        z: [B, d].
    """
    return F.normalize(z.float(), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5


@dataclass(frozen=True)
class BranchSpectra:
    """Eigenvalues of what each branch puts out, averaged over views, of the global batch."""

    online: Tensor  # [n] float64
    target: Tensor
    projection: Tensor
    std: Tensor  # scalar, of the projections

    def metrics(self) -> dict[str, float]:
        """The numbers that are logged; waits for the device."""
        online, target, projection = (
            float(effective_rank(x)) for x in (self.online, self.target, self.projection)
        )
        return {
            "effective_rank/online": online,
            "effective_rank/target": target,
            "effective_rank/projection": projection,
            "rank_difference": target - online,
            "std": float(self.std),
        }


@torch.no_grad()
def branch_spectra(
    online: Tensor, target: Tensor, projection: Tensor, config: FilterConfig | None
) -> BranchSpectra:
    """Spectra of the outputs of both branches; every rank must call it at the same step.

    Args:
        online, target: [v, b, D] of this rank, before any spectral filter.
        projection: [v, b, D], the online encoder's projections.
        config: the spectral filter that one of them still goes through, or None.
    """
    P, Z, projection = gather_rows(torch.cat([online, target, projection])).chunk(3)

    def output(rows: Tensor, location: str) -> Tensor:
        """Mean over views of the eigenvalues of one branch's output."""
        if config is None or config.location != location:
            views = [eigenvalues(z) for z in rows]
        elif config.basis == "online":
            views = [filtered_eigenvalues(z, config, p) for z, p in zip(rows, P, strict=True)]
        else:
            views = [filtered_eigenvalues(z, config) for z in rows]
        return torch.stack([view.sort().values for view in views]).mean(dim=0)

    return BranchSpectra(
        online=output(P, "online"),
        target=output(Z, "target"),
        projection=output(projection, "neither"),
        std=channel_std(projection.flatten(0, 1)),
    )
