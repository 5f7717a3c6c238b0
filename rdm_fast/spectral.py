"""From projections to the filtered loss: which side, which engine, and the loss itself.

The filter of a global batch X [B, D] acts on the smaller of two Gram matrices: X X^T [B, B]
("samples") or X^T X [D, D] ("features"). The eigh engine forms it and solves it in float64:
squaring the singular values costs half the digits, and float32 has not enough for a cutoff of
1e-3. No predictor matrix is formed on the sample side; loss and gradient come from inner
products alone (`rdm_kernels.filtered_cosine`).

Filters are detached, as in the paper's code: the gradient flows through the rows, not through W.
"""

import warnings
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_fast.config import FilterConfig
from rdm_fast.distributed import gather_rows, local_rows
from rdm_fast.errors import Unavailable
from rdm_fast.filters import advice, cutoff, response
from rdm_kernels import filtered_cosine_features, filtered_cosine_samples

WIDE = torch.float64  # squared singular values are accurate to 1e-16 s_max^2


@dataclass(frozen=True)
class Decomposition:
    """Spectrum of a batch X = U S V^T on its smaller side, and the filter's response on it."""

    s: Tensor  # singular values, [v, n] float64, ascending
    g: Tensor  # response, [v, n] float64; 0 where cut off, NaN where X is not finite
    vectors: Tensor  # [v, n, n] float64: columns of U on the sample side, of V on the feature side

    def function(self, values: Tensor) -> Tensor:
        """U diag(values) U^T, [v, n, n] (V on the feature side)."""
        return (self.vectors * values[:, None, :]) @ self.vectors.mT

    @property
    def g_over_s2(self) -> Tensor:
        """The response of h: g(s) / s^2, [v, n]; 0 where cut off."""
        return self.g / self.s.square().where(self.g != 0, 1)


def uses_samples(B: int, D: int) -> bool:
    """Whether the Gram matrix of the samples is the smaller one."""
    return B <= D


def gram(X: Tensor) -> Tensor:
    """X X^T or X^T X, whichever is smaller, [v, n, n] float64, for X [v, B, D]."""
    X = X.to(WIDE)
    return X @ X.mT if uses_samples(*X.shape[1:]) else X.mT @ X


def centre_samples(G: Tensor) -> Tensor:
    """Gram matrix of the centred rows, from that of the rows: H G H, H = I - 11^T / B."""
    mean = G.mean(dim=-1, keepdim=True)
    return G - mean - mean.mT + mean.mean(dim=-2, keepdim=True)


def decompose(G: Tensor, X: Tensor, config: FilterConfig) -> Decomposition:
    """Eigendecomposition of a Gram matrix by the eigh engine, and the response.

    Args:
        G: Gram matrix of X (of the centred X if config.center), [v, n, n] float64.
        X: [v, B, D]; gives the sizes and the dtype whose noise is cut off.
        config: the filter.
    """
    finite = G.isfinite().all(dim=-1).all(dim=-1)
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    eigenvalues, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], G, identity))
    s = eigenvalues.clamp_min(0).sqrt()
    _, B, D = X.shape
    tau = cutoff(s, samples=B, features=D, dtype=X.dtype, relative=config.cutoff)
    g = response(config, s, tau).where(finite[:, None], torch.nan)
    return Decomposition(s, g, vectors)


@torch.no_grad()
def filter_matrix(X: Tensor, config: FilterConfig) -> Tensor:
    """W = V g(S) V^T of a global batch, [v, D, D] float64, for X [v, B, D]."""
    centred = X.to(WIDE) - X.to(WIDE).mean(dim=1, keepdim=True) if config.center else X.to(WIDE)
    spectrum = decompose(gram(centred), X, config)
    if not uses_samples(*X.shape[1:]):
        return spectrum.function(spectrum.g)
    return centred.mT @ spectrum.function(spectrum.g_over_s2) @ centred


# ---- the loss --------------------------------------------------------------------------------


def _samples(p: Tensor, target: Tensor, P: Tensor, Z: Tensor, config: FilterConfig) -> Tensor:
    """Loss of each view with the Gram matrix of the samples."""
    own = config.location == "target" and config.basis == "own"
    X = Z if own else P  # filtered rows are combinations of these
    other = target if config.location == "online" else p
    rows = local_rows(p.shape[1])
    G = gram(X)
    spectrum = decompose(centre_samples(G) if config.center else G, X, config)
    h = spectrum.function(spectrum.g_over_s2)
    if config.basis == "online":  # t = Z W(P) = (Z P^T) h P
        E = target.to(WIDE) @ P.to(WIDE).mT @ h
    elif config.center:  # W is made of centred rows but acts on raw ones
        E = G[:, rows] @ h
    else:
        E = spectrum.function(spectrum.g)[:, rows]
    return filtered_cosine_samples(p, other, X, E, G, h if config.location == "online" else None)


def _features(p: Tensor, target: Tensor, P: Tensor, Z: Tensor, config: FilterConfig) -> Tensor:
    """Loss of each view with the filter matrix itself."""
    own = config.location == "target" and config.basis == "own"
    W = filter_matrix(Z if own else P, config)
    return filtered_cosine_features(p, target, W, config.location == "online")


def _reference(p: Tensor, target: Tensor, P: Tensor, Z: Tensor, config: FilterConfig) -> Tensor:
    """The paper's formulation: thin SVD in float32, no cutoff, autograd through the rows."""
    own = config.location == "target" and config.basis == "own"
    with torch.no_grad():
        X = Z if own else P
        _, s, Vh = torch.linalg.svd(X.to(torch.promote_types(X.dtype, torch.float32)), False)
        g = response(config, s, torch.full_like(s[:, :1], -1.0))
        W = (Vh.mT * g[:, None, :]) @ Vh
    y, t = p.to(W.dtype), target.to(W.dtype)
    y, t = (y @ W, t) if config.location == "online" else (y, t @ W)
    return -F.cosine_similarity(y, t, dim=-1).mean(dim=-1)


def choose_engine(config: FilterConfig) -> str:
    """The engine that `auto` stands for, or the one asked for by name.

    Raises:
        Unavailable: engine=gemm, whose kernels are not built yet.
    """
    if config.engine == "gemm":
        raise Unavailable(
            "filter.engine=gemm is not built yet: use filter.engine=eigh (or auto, which takes it)"
        )
    return "eigh" if config.engine == "auto" else config.engine


@cache
def _warn_once(config: FilterConfig) -> None:
    if (text := advice(config)) is not None:
        warnings.warn(text, stacklevel=3)


def spectral_cosine(online: Tensor, target: Tensor | None, config: FilterConfig) -> Tensor:
    """Mean negative cosine of each view between online and target rows, one of them filtered.

    Args:
        online: this rank's online projections, [v, b, D], any floating dtype.
        target: this rank's targets, same shape and dtype; no gradient reaches them. None for
            the other view's online projections (SimSiam), which are then gathered only once.
        config: the filter; it is taken from the global batch, without gradient.

    Returns:
        [v] float32 (float64 for float64 inputs), within 1e-6 of float64 arithmetic. NaN, with a
        zero gradient, where the global batch holds a value that is not finite.

    Raises:
        ValueError: the two differ in shape or dtype, or are not three-dimensional.
    """
    if online.ndim != 3 or (
        target is not None and (online.shape != target.shape or online.dtype != target.dtype)
    ):
        found = "none" if target is None else f"{target.dtype} {tuple(target.shape)}"
        raise ValueError(
            "spectral_cosine needs [v, b, D] tensors of one shape and dtype, got online "
            f"{online.dtype} {tuple(online.shape)} and target {found}"
        )
    engine = choose_engine(config)
    with torch.autocast(online.device.type, enabled=False):
        if target is None:
            P = gather_rows(online)
            Z, target = P.flip(0), online.detach().flip(0)
        else:
            P, Z = gather_rows(torch.cat([online.detach(), target.detach()])).chunk(2)
            target = target.detach()
        if engine == "reference":
            loss = _reference(online, target, P, Z, config)
        elif uses_samples(*P.shape[1:]):
            loss = _samples(online, target, P, Z, config)
        else:
            loss = _features(online, target, P, Z, config)
    return loss.to(torch.promote_types(online.dtype, torch.float32))


def spectral_loss(
    z1: Tensor,
    z2: Tensor,
    config: FilterConfig,
    *,
    targets: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The symmetric loss of SimSiam or BYOL with a spectral filter for a predictor.

        L = D(z1, t2) / 2 + D(z2, t1) / 2,   D = mean negative cosine, one side filtered

    Args:
        z1, z2: projections of the two views on this rank, [b, D], any floating dtype.
        config: the filter.
        targets: target projections (t1, t2) of view 1 and view 2, as from BYOL's EMA branch;
            left out, they are z1 and z2 themselves, detached, as in SimSiam.

    Returns:
        Scalar in [-1, 1], the mean over this rank's rows. Averaging its gradient over ranks, as
        DistributedDataParallel does, gives the gradient of the global batch.
    """
    _warn_once(config)
    target = None if targets is None else torch.stack([targets[1], targets[0]])
    return spectral_cosine(torch.stack([z1, z2]), target, config).mean()


class SpectralPredictor(nn.Module):
    """p = z W, W the spectral filter of the global batch that z belongs to.

    Put it where a SimSiam or BYOL has its learned predictor (filter.location=online), or apply
    it to the target projections before the loss (filter.location=target). W is detached: the
    gradient is dL/dz = dL/dp W. `spectral_loss` is the same mathematics in one op, and faster.
    """

    def __init__(self, config: FilterConfig) -> None:
        super().__init__()
        self.config = config
        choose_engine(config)
        _warn_once(config)

    def forward(self, z: Tensor) -> Tensor:
        """z: this rank's projections, [b, D]. Returns predictions, [b, D] in z's dtype."""
        with torch.autocast(z.device.type, enabled=False):
            W = filter_matrix(gather_rows(z[None]), self.config)[0]
            return (z.to(WIDE) @ W).to(z.dtype)

    def extra_repr(self) -> str:
        return f"{self.config.kind}, sigma={self.config.sigma:g}, {self.config.location}"
