"""Batches with known spectra, and the paper's formulas in float64, for the tests of the filter."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.filters.loss import SpectralCosine

Shape = tuple[int, int]
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def with_spectrum(B: int, D: int, s: Tensor, seed: int = 0) -> Tensor:
    """A [B, D] float64 matrix with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    n = min(B, D)
    U, _ = torch.linalg.qr(torch.randn(B, n, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(D, n, generator=generator, dtype=torch.float64))
    return U * s.to(torch.float64) @ V.mT


def spectrum(name: str, n: int) -> Tensor:
    """Singular values, largest first, of the shapes that features take (scale of one column)."""
    k = torch.arange(1, n + 1, dtype=torch.float64)
    match name:
        case "flat":
            s = torch.linspace(1.0, 0.8, n, dtype=torch.float64)
        case "k^-1/2":
            s = k**-0.5
        case "k^-1":
            s = k**-1.0
        case "k^-2":
            s = k**-2.0
        case "clusters":  # four groups of equal values
            s = 4.0 ** -(torch.arange(n) * 4 // n).to(torch.float64)
        case "rank 1":
            s = (k == 1).to(torch.float64)
        case "rank 8":
            s = (k <= 8) / k
        case "rank B-1":
            s = (k < n).to(torch.float64)
        case "straddling":  # half of them a tenth of the cutoff
            s = torch.where(k <= n // 2, 1 / k, 1e-5)
        case _:
            raise ValueError(name)
    return s * math.sqrt(n)


SPECTRA = "flat", "k^-1/2", "k^-1", "k^-2", "clusters", "rank 1", "rank 8", "rank B-1", "straddling"


def two_views(
    B: int, D: int, name: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Correlated views: the second has the same spectrum, and rows near the first one's."""
    s = spectrum(name, min(B, D))
    z1 = with_spectrum(B, D, s, seed=0)
    z2 = 0.8 * z1 + 0.6 * with_spectrum(B, D, s, seed=1)
    return z1.to(dtype), z2.to(dtype)


def g(config: FilterConfig, s: Tensor) -> Tensor:
    """The paper's g(s), literally."""
    return {
        "poly": lambda: s**config.sigma,
        "log": lambda: torch.log(s),
        "log_1": lambda: torch.log(1 + s),
        "log_2": lambda: torch.log(1 + s**2),
    }[config.kind]()


def right_svd(X: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and V^T of a float64 batch; those of the last few batches are kept."""
    return _right_svd(X.detach().cpu().numpy().tobytes(), X.shape, X.device)


@lru_cache(maxsize=8)
def _right_svd(data: bytes, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    X = torch.frombuffer(bytearray(data), dtype=torch.float64).reshape(shape).to(device)
    return torch.linalg.svd(X, full_matrices=False)[1:]


def paper_filter(X: Tensor, config: FilterConfig) -> Tensor:
    """W = V g(S) V^T of a batch by its thin SVD in float64, without what is under the cutoff."""
    B, D = X.shape
    wide = X.double()
    if config.center:
        wide = wide - wide.mean(dim=0)
    s, Vh = right_svd(wide)
    u = UNIT_ROUNDOFF.get(X.dtype, 2.0**-53)
    noise = 0.75 * u * wide.square().mean().sqrt() * (math.sqrt(B) + math.sqrt(D))
    kept = s > max(config.cutoff * float(s[0]), float(noise))
    return (Vh[kept].mT * g(config, s[kept])) @ Vh[kept]


def damped_filter(X: Tensor, config: FilterConfig) -> Tensor:
    """W as the gemm engine defines it: strengths s / (s^2 + tau^2)^(1/2) in place of a cutoff.

    W = V g(sqrt(S^2 + tau^2)) S^2 / (S^2 + tau^2) V^T
    tau = max(cutoff c^(1/2), 1e-3 c^(1/2), noise)
    """
    if config.kind == "poly" and config.sigma == 2:
        W = X.double().mT @ X.double()
        return W / W.trace().clamp_min(1e-300)  # a cosine takes any scale, PyTorch's eps does not
    B, D = X.shape
    s, Vh = right_svd(X.double())
    root_c = torch.linalg.vector_norm(s, 8)  # c = |G^2|_F^(1/2)
    noise = 0.75 * UNIT_ROUNDOFF.get(X.dtype, 2.0**-53) * X.double().square().mean().sqrt()
    cutoff = max(config.cutoff, 1e-3)
    tau = max(cutoff * float(root_c), float(noise) * (math.sqrt(B) + math.sqrt(D)))
    damped = (s.square() + tau**2).sqrt()
    return (Vh.mT * (g(config, damped) * (s / damped).square())) @ Vh


def paper_loss(
    z1: Tensor,
    z2: Tensor,
    config: FilterConfig,
    targets: tuple[Tensor, Tensor] | None = None,
    filter_of: Callable[[Tensor, FilterConfig], Tensor] = paper_filter,
) -> tuple[Tensor, Tensor, Tensor]:
    """The symmetric loss and its gradients for z1 and z2 by autograd, in float64."""
    t1, t2 = (z1, z2) if targets is None else targets
    leaves = [z.double().detach().requires_grad_() for z in (z1, z2)]
    loss = torch.zeros((), dtype=torch.float64, device=z1.device)
    for p, raw, t in ((leaves[0], z1, t2), (leaves[1], z2, t1)):
        own = config.location == "target" and config.basis == "own"
        W = filter_of(t.detach() if own else raw.detach(), config)
        y, z = (p @ W, t.double()) if config.location == "online" else (p, t.double() @ W)
        loss = loss - F.cosine_similarity(y, z.detach(), dim=1).mean() / 2
    loss.backward()
    gradients = [leaf.grad for leaf in leaves]
    assert gradients[0] is not None and gradients[1] is not None
    return loss.detach(), gradients[0], gradients[1]


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in the Frobenius norm."""
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- what is tested ----------------------------------------------------------------------------

SHAPES = [(24, 64), (48, 48), (64, 24)]
ONLINE = [FilterConfig(sigma=s) for s in (0.5, 1.0, 2.0)] + [
    FilterConfig(kind=kind) for kind in ("log", "log_1", "log_2")
]
TARGET = [FilterConfig(location="target", sigma=s) for s in (-1.0, -0.7, -0.5, -0.3, 0.0, 1.0)]
VARIANTS = [
    FilterConfig(location="target", sigma=-0.5, basis="online"),
    FilterConfig(location="target", kind="log_1"),
    FilterConfig(sigma=1.0, center=True),
    FilterConfig(location="target", sigma=-1.0, center=True),
    FilterConfig(location="target", sigma=-0.5, basis="online", center=True),
]


def name(value: object) -> str:
    """An id for pytest."""
    if not isinstance(value, FilterConfig):
        return str(value)
    config = value
    flags = "-".join([config.basis] * (config.basis != "own") + ["center"] * config.center)
    return f"{config.location}-{config.kind}{config.sigma:g}{flags}"


def gradients(
    z1: Tensor,
    z2: Tensor,
    config: FilterConfig,
    targets: tuple[Tensor, Tensor] | None = None,
    criterion: SpectralCosine | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The symmetric loss and its gradients for z1 and z2, by a new criterion or the given one."""
    a, b = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    target = None if targets is None else torch.stack([targets[1], targets[0]])
    criterion = SpectralCosine(config) if criterion is None else criterion
    loss = criterion(torch.stack([a, b]), target).mean()
    loss.backward()
    assert a.grad is not None and b.grad is not None
    return loss.detach(), a.grad, b.grad
