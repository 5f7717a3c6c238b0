"""From projections to the filtered loss, by whichever engine computes the filter.

    online   L = -mean cos(p W, z)      target   L = -mean cos(p, z W)

W = V g(S) V^T is the spectral filter of the global batch X = U S V^T that the filtered rows belong
to (of the online rows, with basis=online). It is detached, as in the paper's code: the gradient
flows through the rows, not through W. An online filter and its gradient are one op
(`rdm_kernels.filtered_cosine`); filtered targets are rows like any others.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rdm_fast.config import FilterConfig
from rdm_fast.filters.engines import build_filter, engine_for
from rdm_fast.filters.response import advice
from rdm_fast.runtime.distributed import gather_rows, local_rows, world_size
from rdm_kernels import neg_cosine


@cache
def _warn_once(config: FilterConfig) -> None:
    if (text := advice(config)) is not None:
        warnings.warn(text, stacklevel=3)


def over_pairs(loss: Callable[[Tensor], Tensor], target: Tensor, n_online: int) -> Tensor:
    """A loss of every pair of views that are matched.

    The first online views have a target each. Further ones, small views of the same images, have
    them all: pairs are (0, 0), (1, 1), (2, 0), (3, 0), ..., (2, 1), (3, 1), ...

    Args:
        loss: of all online views, [v], with targets [v, b, D].
        target: [t, b, D], t at most v.
        n_online: v.

    Returns:
        [t + (v - t) t]
    """
    n, further = len(target), n_online - len(target)
    if not further:
        return loss(target)
    losses = [loss(torch.cat([target, met.expand(further, -1, -1)])) for met in target.split(1)]
    return torch.cat([losses[0], *(met[n:] for met in losses[1:])])


def spectral_cosine(online: Tensor, target: Tensor | None, config: FilterConfig) -> Tensor:
    """Mean negative cosine of each pair of views between online and target rows, one filtered.

    Args:
        online: this rank's online projections, [v, b, D], any floating dtype.
        target: this rank's targets, the same shape and dtype, or of fewer views, [t, b, D]: all
            further online views are matched with every target (`over_pairs`). No gradient
            reaches them. None for the other view's online projections (SimSiam), which are then
            gathered only once.
        config: the filter; it is taken from the global batch, without gradient.

    Returns:
        [v], or [t + (v - t) t], float32 (float64 for float64 inputs), within 1e-6 of float64
        arithmetic by the eigh engine. NaN where the global batch holds a value that is not finite;
        the gradient is then finite, and zero for a filtered view or row.

    Raises:
        ValueError: the two do not fit together, or are not three-dimensional.
        Unavailable: engine=gemm cannot be accurate for this filter, or was not on the last batch.
    """
    if online.ndim != 3 or (target is not None and not _fits(online, target)):
        found = "none" if target is None else f"{target.dtype} {tuple(target.shape)}"
        raise ValueError(
            "spectral_cosine needs [v, b, D] tensors of one dtype, and no more targets than online "
            f"views, got online {online.dtype} {tuple(online.shape)} and target {found}"
        )
    engine = engine_for(config, online.device)
    with torch.autocast(online.device.type, enabled=False):
        swapped = target is None and world_size() == 1 and len(online) == 2
        swapped = swapped and config.location == "online"  # a target's rows meet no others
        if target is None:
            P = gather_rows(online)
            Z = P.flip(0)
        else:
            every = gather_rows(torch.cat([online.detach(), target.detach()]))
            P, Z = every.split([len(online), len(target)])
        rows = local_rows(online.shape[1])
        target = Z[:, rows]
        own_target = config.location == "target" and config.basis == "own"
        X = Z if own_target else P
        W = build_filter(engine.current(), X, rows, config, swapped=swapped)

        def matched(rows: Tensor) -> Tensor:
            if config.location == "online":
                return W.cosine(online, rows)
            return neg_cosine(online, rows if own_target else W.other_rows(rows))

        loss = over_pairs(matched, W.own_rows() if own_target else target, len(online))
        engine.watch(W.status)
    return loss.to(torch.promote_types(online.dtype, torch.float32))


def _fits(online: Tensor, target: Tensor) -> bool:
    return (
        target.ndim == 3
        and len(target) <= len(online)
        and target.shape[1:] == online.shape[1:]
        and target.dtype == online.dtype
    )


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


class _Filtered(torch.autograd.Function):
    """z W for rows z of the batch that W is the filter of; W is detached: dL/dz = dL/dy W."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, config: FilterConfig) -> Tensor:
        engine = engine_for(config, z.device)
        ctx.W = build_filter(engine.current(), gather_rows(z[None]), local_rows(len(z)), config)
        p = ctx.W.own_rows()[0].to(z.dtype)
        engine.watch(ctx.W.status)
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(grad.device.type, enabled=False):
            return ctx.W.other_rows(grad[None])[0].to(grad.dtype), None


class SpectralPredictor(nn.Module):
    """p = z W, W the spectral filter of the global batch that z belongs to.

    Put it where a SimSiam or BYOL has its learned predictor (filter.location=online), or apply
    it to the target projections before the loss (filter.location=target). W is detached: the
    gradient is dL/dz = dL/dp W. `spectral_loss` is the same mathematics in one op, and faster.
    """

    def __init__(self, config: FilterConfig) -> None:
        super().__init__()
        self.config = config
        _warn_once(config)

    def forward(self, z: Tensor) -> Tensor:
        """z: this rank's projections, [b, D]. Returns predictions, [b, D] in z's dtype."""
        with torch.autocast(z.device.type, enabled=False):
            # whatever its location, it may be differentiated through
            return _Filtered.apply(z, replace(self.config, location="online", basis="own"))

    def extra_repr(self) -> str:
        return f"{self.config.kind}, sigma={self.config.sigma:g}, {self.config.location}"
