"""The spectra of both branches of a training step, from the rows that the step has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.runtime.distributed import gather_rows
from rdm_fast.spectrum.directions import Directions, alignment, directions, measured_response
from rdm_fast.spectrum.measures import (
    attainable_rank,
    channel_std,
    effective_rank,
    eigenvalues,
    filtered_eigenvalues,
    filtered_rows,
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Profile:
    """Measures that need eigenvectors: averaged over views, strongest direction first."""

    s: Tensor  # [n] float64, singular values of the rows that the predictor or filter takes
    response: Tensor  # [n], how much it scales their directions; NaN under the cutoff
    alignment: Tensor  # scalar, of the online branch's output with the target's eigenvectors


@dataclass(frozen=True)
class BranchSpectra:
    """Eigenvalues of the outputs of each branch, over the global batch, averaged over views."""

    online: Tensor  # [n] float64, ascending
    target: Tensor
    projection: Tensor
    std: Tensor  # scalar, of the projections
    attainable: Tensor  # scalar, the largest effective rank that the projections could have
    profile: Profile | None = None
    more: Mapping[str, Tensor] = field(default_factory=dict)
    """Further scalars, by the names under which they are logged."""

    def metrics(self) -> dict[str, float]:
        """The numbers that are logged; waits for the device."""
        online, target, projection = (
            float(effective_rank(x)) for x in (self.online, self.target, self.projection)
        )
        metrics = {
            "effective_rank/online": online,
            "effective_rank/target": target,
            "effective_rank/projection": projection,
            "effective_rank/share": projection / float(self.attainable),
            "rank_difference": target - online,
            "std": float(self.std),
        }
        if self.profile is not None:
            metrics["alignment"] = float(self.profile.alignment)
        return metrics | {key: float(value) for key, value in self.more.items()}

    def record(self) -> dict[str, np.ndarray | float]:
        """A record of `spectrum.jsonl`; needs a profile, and waits for the device."""
        assert self.profile is not None
        values = {name: getattr(self, name).flip(0) for name in ("online", "target", "projection")}
        values |= {"s": self.profile.s, "response": self.profile.response}
        arrays = {name: tensor.cpu().numpy() for name, tensor in values.items()}
        return {**arrays, "alignment": float(self.profile.alignment)}


@torch.no_grad()
def branch_spectra(
    online: Tensor,
    target: Tensor,
    projection: Tensor,
    config: FilterConfig | None,
    *,
    profile: bool = False,
) -> BranchSpectra:
    """Spectra of the outputs of both branches; every rank must call it at the same step.

    No batch is decomposed twice: with a spectral filter the online rows are the projections, and
    in SimSiam the targets are those of the other view.

    Args:
        online: [v, b, K] of this rank, before any spectral filter; small views, which have no
            projections here, are left out.
        target: [v, b, K], likewise before a filter.
        projection: [v, b, D], the online encoder's projections.
        config: the spectral filter that one of them still goes through, or None.
        profile: also measure what takes eigenvectors.
    """
    online = online[: len(projection)]
    P, Z, projection = gather_rows(torch.cat([online, target, projection])).chunk(3)
    axes = OncePerBatch(directions)

    def own(z: Tensor) -> Tensor:
        return axes(z).s.flip(0).square() / len(z) if profile else eigenvalues(z)

    values = OncePerBatch(own)

    def output(rows: Tensor, location: str) -> Tensor:
        """Mean over views of the eigenvalues of one branch's output."""
        if config is None or config.location != location:
            views = [values(z) for z in rows]
        elif config.basis == "online":
            views = [filtered_eigenvalues(z, config, p) for z, p in zip(rows, P, strict=True)]
        else:
            views = [filtered_eigenvalues(z, config, own=values(z)) for z in rows]
        return torch.stack([view.sort().values for view in views]).mean(dim=0)

    return BranchSpectra(
        online=output(P, "online"),
        target=output(Z, "target"),
        projection=output(projection, "neither"),
        std=channel_std(projection.flatten(0, 1)),
        attainable=attainable_rank(projection[0]),
        profile=_profile(P, Z, projection, config, axes) if profile else None,
    )


def _profile(
    P: Tensor,
    Z: Tensor,
    projection: Tensor,
    config: FilterConfig | None,
    axes: "OncePerBatch[Directions]",
) -> Profile:
    s, responses, alignments = [], [], []
    for p, z, taken in zip(P, Z, projection, strict=True):
        made = p  # by the learned predictor
        if config is not None and config.location == "online":
            p = made = filtered_rows(p, config)
        elif config is not None:
            taken, made = z, filtered_rows(z, config, p if config.basis == "online" else None)
        s.append(axes(taken).s)
        responses.append(measured_response(taken, made, axes(taken)))
        alignments.append(alignment(p, axes(z)))
    return Profile(*(torch.stack(views).mean(dim=0) for views in (s, responses, alignments)))


class OncePerBatch(Generic[Result]):
    """A function of a batch that is computed once for equal batches."""

    def __init__(self, function: Callable[[Tensor], Result]) -> None:
        self._function = function
        self._known: list[tuple[Tensor, Result]] = []

    def __call__(self, z: Tensor) -> Result:
        for batch, result in self._known:
            if torch.equal(batch, z):
                return result
        result = self._function(z)
        self._known.append((z, result))
        return result
