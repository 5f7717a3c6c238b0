"""From projections to the filtered loss: which side, which engine, and the loss itself.

The filter of a global batch X = U S V^T [B, D] needs V and S. The eigh engine takes them from the
smaller of two Gram matrices, X X^T = U S^2 U^T [B, B] ("samples") or X^T X = V S^2 V^T [D, D]
("features"), formed and solved in float64: squaring the singular values costs half the digits,
and float32 has not enough for a cutoff of 1e-3. On the sample side V = X^T U / S is never formed;
loss and gradient are made of inner products (`rdm_kernels.filtered_cosine`).

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
from rdm_kernels import filtered_cosine, safe_eigh

WIDE = torch.float64  # squared singular values are accurate to 1e-16 s_max^2


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


def exact(X: Tensor) -> Tensor:
    """X in a dtype that holds products of its elements exactly: float32 for 16 bits, else float64.

    What is left is the rounding of sums, so a Gram matrix has the accuracy of that dtype.
    """
    return X.to(torch.float32 if X.dtype.itemsize == 2 else WIDE)


def gram(X: Tensor) -> Tensor:
    """X X^T or X^T X, whichever is smaller, [v, n, n] float64, for X [v, B, D]."""
    X = exact(X)
    return (X @ X.mT if uses_samples(*X.shape[1:]) else X.mT @ X).to(WIDE)


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
    spectrum = decompose(gram(wide), X, config)
    if uses_samples(*X.shape[1:]):
        return wide.mT @ spectrum.U_over_S, spectrum.g
    return spectrum.vectors, spectrum.g


# ---- the loss --------------------------------------------------------------------------------


def _samples(p: Tensor, z: Tensor, P: Tensor, Z: Tensor, config: FilterConfig) -> Tensor:
    """Loss of each view by the Gram matrix of the samples X of the branch that gives the basis."""
    own_target = config.location == "target" and config.basis == "own"
    X, x, other = (Z, z, p) if own_target else (P, p, z)
    rows = local_rows(x.shape[1])
    G = gram(X)
    spectrum = decompose(centre_samples(G) if config.center else G, X, config)
    U_over_S = spectrum.U_over_S
    if config.center:  # the basis is of centred rows, the rows in it are not
        xV = G[:, rows] @ U_over_S
    else:
        xV = spectrum.vectors[:, rows] * spectrum.s[:, None, :]
    otherV = (exact(other) @ exact(X).mT).to(WIDE) @ U_over_S
    pV, zV = (otherV, xV) if own_target else (xV, otherV)
    online = config.location == "online"
    norm = (z if online else p).to(WIDE).norm(dim=-1)
    return filtered_cosine(p, norm, pV, zV, spectrum.g, U_over_S, X, online=online)


def _features(p: Tensor, z: Tensor, P: Tensor, Z: Tensor, config: FilterConfig) -> Tensor:
    """Loss of each view by the Gram matrix of the features."""
    own_target = config.location == "target" and config.basis == "own"
    V, g = right_vectors(Z if own_target else P, config)
    pV, zV = p.to(WIDE) @ V, z.to(WIDE) @ V
    online = config.location == "online"
    norm = (z if online else p).to(WIDE).norm(dim=-1)
    return filtered_cosine(p, norm, pV, zV, g, V, None, online=online)


def _reference(p: Tensor, z: Tensor, P: Tensor, Z: Tensor, config: FilterConfig) -> Tensor:
    """The paper's formulation: thin SVD in float32, no cutoff, autograd through the rows."""
    own_target = config.location == "target" and config.basis == "own"
    with torch.no_grad():
        X = Z if own_target else P
        _, s, Vh = torch.linalg.svd(X.to(torch.promote_types(X.dtype, torch.float32)), False)
        g = response(config, s, torch.full_like(s[:, :1], -1.0))
        W = (Vh.mT * g[:, None, :]) @ Vh
    y, t = p.to(W.dtype), z.to(W.dtype)
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
            V, g = right_vectors(gather_rows(z[None]), self.config)
            return (((z.to(WIDE) @ V[0]) * g[0]) @ V[0].mT).to(z.dtype)

    def extra_repr(self) -> str:
        return f"{self.config.kind}, sigma={self.config.sigma:g}, {self.config.location}"
