"""Rivals of rdm_fast.spectral_loss: the RDM paper's formulation, and a careful PyTorch user's.

Both take projections z1, z2 [B, D] of one rank and compute in float32, or float64 for float64,
outside autocast. Filters are detached. The loss has two directions, and each decomposes a matrix of
its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_fast import FilterConfig
from rdm_fast.filters.response import cutoff


def response(config: FilterConfig, s: Tensor) -> Tensor:
    """g(s), elementwise."""
    match config.kind:
        case "poly":
            return s**config.sigma
        case "log":
            return s.log()
        case "log_1":
            return s.log1p()
        case "log_2":
            return s.square().log1p()


def svd_loss(z1: Tensor, z2: Tensor, config: FilterConfig) -> Tensor:
    """The paper's formulation: a thin SVD of the online or the target rows.

        online: p <- p V g(S) V^T        target (poly only): z <- U S^(1 + sigma) V^T

    It keeps every direction, even those of pure rounding error.
    """

    def direction(p: Tensor, z: Tensor) -> Tensor:
        p, z = _widen(p), _widen(z.detach())
        online = config.location == "online"
        with torch.no_grad():
            U, s, Vh = torch.linalg.svd(p if online else z, full_matrices=False)
            if online:
                W = Vh.mT @ torch.diag(response(config, s)) @ Vh  # [D, D]
            else:
                z = U @ torch.diag(s ** (1 + config.sigma)) @ Vh
        if online:
            p = p @ W
        return -F.cosine_similarity(p, z, dim=1).mean()

    return (direction(z1, z2) + direction(z2, z1)) / 2


def gram_eigh_loss(z1: Tensor, z2: Tensor, config: FilterConfig) -> Tensor:
    """The same by an eigendecomposition of the smaller Gram matrix, without weak directions.

    W = V g(S) V^T, with V^T = S^-1 U^T X from X X^T = U S^2 U^T where B <= D
    """

    def direction(p: Tensor, z: Tensor) -> Tensor:
        p, z = _widen(p), _widen(z.detach())
        online = config.location == "online"
        with torch.no_grad():
            X = p if online else z
            samples = len(X) <= X.shape[1]
            eigenvalues, vectors = torch.linalg.eigh(X @ X.mT if samples else X.mT @ X)
            s = eigenvalues.clamp_min(0).sqrt()
            B, D = X.shape
            tau = cutoff(s[None], samples=B, features=D, dtype=z1.dtype, relative=config.cutoff)
            kept = s > tau[0]
            s = s.where(kept, 1)
            g = response(config, s) * kept
            basis = vectors.mT @ X / s[:, None] if samples else vectors.mT  # rows of V^T
        if online:
            p = ((p @ basis.mT) * g) @ basis
        else:
            z = ((z @ basis.mT) * g) @ basis
        return -F.cosine_similarity(p, z, dim=1).mean()

    return (direction(z1, z2) + direction(z2, z1)) / 2


def _widen(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))
