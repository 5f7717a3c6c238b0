"""Negative cosine between the branches, plain or with a spectral filter on one side.

    plain    L = -mean cos(p, z)
    online   L = -mean cos(p W, z)
    target   L = -mean cos(p, z W)

W = V g(S) V^T is the spectral filter of the global batch X = U S V^T that the filtered rows belong
to (of the online rows, with basis=online). It is detached, as in the paper's code: the gradient
flows through the rows, not through W. An online filter and its gradient are one op
(`rdm_kernels.filtered_cosine`); a filtered target is an ordinary target.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from rdm_fast.config import FilterConfig
from rdm_fast.filters.engines import EngineSelector, build_filter
from rdm_fast.filters.response import advice
from rdm_fast.runtime.distributed import gather_rows, local_rows, world_size
from rdm_fast.runtime.printing import warn
from rdm_kernels import neg_cosine


class Criterion(nn.Module, ABC):
    """Loss between the rows of both branches. Has no parameters and adds nothing to checkpoints.

    Attributes:
        row_wise: the loss is a mean over rows, so a batch may be computed in parts.
        filter: the spectral filter, if there is one.
        selector: chooses the engine that computes it.
    """

    row_wise: bool = True
    filter: FilterConfig | None = None
    selector: EngineSelector | None = None

    @property
    def applied(self) -> FilterConfig | None:
        """The filter as its engine applies it, for `rdm_fast.spectrum`."""
        return None if self.selector is None else self.selector.applied

    @abstractmethod
    def forward(self, online: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss of each pair of views (`pairwise_losses`), float32, float64 for float64 inputs.

        Args:
            online: this rank's online rows, [v, b, D], any floating dtype.
            target: this rank's target rows in the same dtype, [t, b, D], t at most v; no gradient
                reaches them. None stands for the first two online views, swapped (SimSiam).
        """


def pairwise_losses(loss: Callable[[Tensor], Tensor], target: Tensor, n_online: int) -> Tensor:
    """The loss of every pair of an online view and a target that are matched.

    The first t online views have one target each. Any further ones (small views) are matched with
    every target: the pairs are (0, 0), (1, 1), (2, 0), (3, 0), ..., (2, 1), (3, 1), ...

    Args:
        loss: from targets [v, b, D] to the losses [v] of all online views.
        target: [t, b, D], t at most v.
        n_online: v.

    Returns:
        [t + (v - t) t]
    """
    n, further = len(target), n_online - len(target)
    if not further:
        return loss(target)
    losses = [loss(torch.cat([target, z.expand(further, -1, -1)])) for z in target.split(1)]
    return torch.cat([losses[0], *(each[n:] for each in losses[1:])])


class NegativeCosine(Criterion):
    """Mean negative cosine of each pair of views, without a filter."""

    def forward(self, online: Tensor, target: Tensor | None = None) -> Tensor:
        target = online[:2].flip(0) if target is None else target
        with torch.autocast(online.device.type, enabled=False):
            return pairwise_losses(partial(neg_cosine, online), target.detach(), len(online))


class SpectralCosine(Criterion):
    """Mean negative cosine of each pair of views, with one side filtered.

    The filter is that of the global batch. The loss of the eigh engine is within 2e-6 of float64
    arithmetic on the inputs, whatever their dtype.
    If the global batch holds a value that is not finite, the loss is NaN on every rank; the
    gradient stays finite, and is zero for a filtered view or row.

    Raises:
        ValueError: online and target rows do not fit together, or are not three-dimensional.
        Unavailable: engine=gemm was not accurate on the last batch.
    """

    row_wise = False  # W depends on every row

    def __init__(self, filter: FilterConfig) -> None:
        super().__init__()
        self.filter: FilterConfig = filter
        self.selector: EngineSelector = EngineSelector(filter)

    def forward(self, online: Tensor, target: Tensor | None = None) -> Tensor:
        _require_fit(online, target)
        config, engine = self.filter, self.selector.current(online.device)
        with torch.autocast(online.device.type, enabled=False):
            swapped = target is None and world_size() == 1 and len(online) == 2
            if target is None:
                P = gather_rows(online)
                Z = P[:2].flip(0)
            else:
                every = gather_rows(torch.cat([online.detach(), target.detach()]))
                P, Z = every.split([len(online), len(target)])
            rows = local_rows(online.shape[1])
            target = Z[:, rows]
            if config.location == "online":
                W = build_filter(engine, P, rows, config, swapped=swapped)
                loss = pairwise_losses(partial(W.cosine, online), target, len(online))
            elif config.basis == "own":
                W = build_filter(engine, Z, rows, config)
                loss = pairwise_losses(partial(neg_cosine, online), W.filter_batch(), len(online))
            else:
                W = build_filter(engine, P, rows, config)
                loss = pairwise_losses(
                    lambda z: neg_cosine(online, W.filter_rows(z)), target, len(online)
                )
        self.selector.watch(W.status)
        return loss.to(torch.promote_types(online.dtype, torch.float32))

    def extra_repr(self) -> str:
        return str(self.filter)


def _require_fit(online: Tensor, target: Tensor | None) -> None:
    z = online if target is None else target
    alike = z.shape[1:] == online.shape[1:] and z.dtype == online.dtype
    if alike and z.ndim == 3 and len(z) <= len(online):
        return
    found = "none" if target is None else f"{target.dtype} {tuple(target.shape)}"
    raise ValueError(
        "SpectralCosine needs [v, b, D] tensors of one dtype, and no more targets than online "
        f"views, got online {online.dtype} {tuple(online.shape)} and target {found}"
    )


# ---- for other people's training loops -------------------------------------------------------


def _warn(config: FilterConfig, stacklevel: int) -> None:
    if (text := advice(config)) is not None:
        warn(text, stacklevel=stacklevel + 1)


@cache
def _criterion(config: FilterConfig, device: torch.device) -> SpectralCosine:
    """The criterion that all calls of `spectral_loss` share; it remembers a failed engine."""
    _warn(config, stacklevel=3)
    return SpectralCosine(config)


def spectral_loss(
    z1: Tensor,
    z2: Tensor,
    config: FilterConfig,
    *,
    targets: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The symmetric loss of SimSiam or BYOL with a spectral filter in place of the predictor.

        L = D(z1, t2) / 2 + D(z2, t1) / 2,   D = mean negative cosine, one side filtered

    Args:
        z1, z2: projections of the two views on this rank, [b, D], any floating dtype.
        config: the filter.
        targets: target projections (t1, t2) of view 1 and view 2, for example from BYOL's EMA
            branch. By default z1 and z2 themselves, detached, as in SimSiam.

    Returns:
        Scalar in [-1, 1], the mean over this rank's rows. Averaging its gradient over ranks, as
        DistributedDataParallel does, gives the gradient of the global batch.
    """
    target = None if targets is None else torch.stack([targets[1], targets[0]])
    loss: Tensor = _criterion(config, z1.device)(torch.stack([z1, z2]), target)
    return loss.mean()


class SpectralPredictor(nn.Module):
    """p = z W, where W is the spectral filter of the global batch that z belongs to.

        W = V g(S) V^T,   g(s) = (s / s_rms)^sigma for kind=poly,   s_rms^2 = |Z|_F^2 / min(B, D)

    Every engine gives this scale, which keeps p about as large as z for any batch size: a flat
    spectrum passes unchanged. The other kinds are g(s) as written.

    Use it in place of the learned predictor of a SimSiam or BYOL (filter.location=online), or
    apply it to the target projections before the loss (filter.location=target). W is detached:
    the gradient is dL/dz = dL/dp W. `spectral_loss` is the same mathematics in one op, and faster.
    """

    def __init__(self, config: FilterConfig) -> None:
        super().__init__()
        _warn(config, stacklevel=2)
        self.config = config
        # Gradients may flow through p at either location, as through an online filter.
        self.selector = EngineSelector(replace(config, location="online", basis="own"))

    def forward(self, z: Tensor) -> Tensor:
        """z: this rank's projections, [b, D]. Returns predictions, [b, D] in z's dtype."""
        with torch.autocast(z.device.type, enabled=False):
            return _Filtered.apply(z, self.selector)

    def extra_repr(self) -> str:
        return f"{self.config.kind}, sigma={self.config.sigma:g}, {self.config.location}"


class _Filtered(torch.autograd.Function):
    """z W for the rows z of the batch that W filters; W is detached, so dL/dz = dL/dp W."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, selector: EngineSelector) -> Tensor:
        engine = selector.current(z.device)
        batch, rows = gather_rows(z[None]), local_rows(len(z))
        ctx.W = build_filter(engine, batch, rows, selector.config)
        p = (ctx.W.filter_batch() * ctx.W.scale)[0].to(z.dtype)
        selector.watch(ctx.W.status)
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(grad.device.type, enabled=False):
            return (ctx.W.filter_rows(grad[None]) * ctx.W.scale)[0].to(grad.dtype), None
