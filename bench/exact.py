"""The batches that benchmarks filter, and their exact loss and gradient in float64.

Two definitions for directions that are too weak to filter:

    cutoff    W = V g(S) V^T over s > tau                                      eigh engine
    damped    W = V g(D) (S / D)^2 V^T, D = (S^2 + tau^2)^(1/2)                gemm engine

tau is the cutoff times s_1 or, damped, times c^(1/2) = (sum s^8)^(1/8); rounding noise if larger.
"""

from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.reference import response
from rdm_fast import FilterConfig
from rdm_fast.filters.engines.gemm import LEAST_CUTOFF
from rdm_fast.filters.response import cutoff, noise_share

Definition = Literal["cutoff", "damped"]


class Spectrum(NamedTuple):
    """X = U S V^T [B, D], float64."""

    s: Tensor  # [n], ascending
    V: Tensor  # [D, n]


@cache
def views(B: int, D: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Projections of two views, [B, D], as after a projector's final batch norm.

    Features are centered and of unit variance; the spectrum falls as k^-1 in energy; the two
    views share nine tenths of their energy.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(B, D, generator=generator)
    noise = torch.randn(2, B, D, generator=generator)
    strength = torch.arange(1, D + 1) ** -0.5
    rotation = torch.randn(D, D, generator=generator).to(device)
    z = ((0.9**0.5 * image + 0.1**0.5 * noise) * strength).to(device)
    z = z @ torch.linalg.qr(rotation).Q
    z = (z - z.mean(dim=1, keepdim=True)) / z.std(dim=1, keepdim=True)
    z1, z2 = z.to(dtype)
    return z1.requires_grad_(), z2.requires_grad_()


@torch.no_grad()
def decompose(X: Tensor) -> Spectrum:
    """SVD by the smaller Gram matrix, which in float64 keeps ten digits of s > 1e-3 s_max."""
    X = X.double()
    is_wide = X.shape[0] <= X.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(X @ X.mT if is_wide else X.mT @ X)
    s = eigenvalues.clamp_min(0).sqrt()
    return Spectrum(s, (X.mT @ vectors) / s.clamp_min(1e-9 * s[-1]) if is_wide else vectors)


@cache
def spectra(B: int, D: int, device: torch.device, dtype: torch.dtype) -> tuple[Spectrum, Spectrum]:
    """Of the two views of a batch."""
    z1, z2 = views(B, D, device, dtype)
    return decompose(z1), decompose(z2)


def weights(
    config: FilterConfig, s: Tensor, definition: Definition, B: int, D: int, dtype: torch.dtype
) -> Tensor:
    """Factor of each direction, [n], in the filter of a batch [B, D] of this dtype."""
    if definition == "damped":
        if config.kind == "poly" and config.sigma == 2:
            return s.square()
        noise = noise_share(samples=B, features=D, dtype=dtype) * s.norm()
        root_c = torch.linalg.vector_norm(s, 8)
        tau = torch.maximum(max(config.cutoff, LEAST_CUTOFF) * root_c, noise)
        damped = (s.square() + tau.square()).sqrt()
        return response(config, damped) * (s / damped).square()
    tau = cutoff(s[None], samples=B, features=D, dtype=dtype, relative=config.cutoff)[0]
    kept = s > tau
    return torch.where(kept, response(config, s.where(kept, 1)), 0)


def exact(
    config: FilterConfig, z1: Tensor, z2: Tensor, definition: Definition,
    spectra: tuple[Spectrum, Spectrum],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The symmetric loss and its gradient for (z1, z2) as one vector, [2 B D], in float64."""
    leaves = [z.detach().double().requires_grad_() for z in (z1, z2)]
    online = config.location == "online"
    loss = torch.zeros((), dtype=torch.float64, device=z1.device)
    for p, t, own, other in ((0, 1, *spectra), (1, 0, *spectra[::-1])):
        s, V = own if online else other
        w = weights(config, s, definition, *z1.shape, z1.dtype)
        y, z = leaves[p], leaves[t].detach()
        y, z = (((y @ V) * w) @ V.mT, z) if online else (y, ((z @ V) * w) @ V.mT)
        loss = loss - F.cosine_similarity(y, z, dim=1).mean() / 2
    gradient = torch.stack(torch.autograd.grad(loss, leaves)).flatten()
    return loss.detach(), gradient
