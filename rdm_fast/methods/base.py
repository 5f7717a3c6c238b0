"""What every method has: two branches that depend on one image each, and a criterion on the batch.

The split is what lets a step be computed in parts (gradient accumulation) and still be the step
of the whole batch: branches run part by part, the criterion sees all rows at once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rdm_fast.config import FilterConfig
from rdm_fast.filters.loss import over_pairs
from rdm_kernels import neg_cosine


@dataclass
class Branches:
    """What the two branches make of the views, before any spectral filter.

    online: [2 + k, b, D]; target, projection: [2, b, D]. online[v] is to be matched with target[v],
    which comes from the other view; with k small views (multi-crop), each of these with both
    targets. projection is the online encoder's output for either view, detached, for telemetry.
    """

    online: Tensor
    target: Tensor
    projection: Tensor


@dataclass
class StepOutput:
    """The loss of this rank's rows, to be differentiated, and the branches it came from."""

    loss: Tensor
    branches: Branches


class Method(nn.Module, ABC):
    """From two views of the same images, or more, to the loss."""

    backbone: nn.Module
    """From views [b, C, H, W] to embeddings [b, d_emb]: what evaluation uses."""
    projector: nn.Module
    """From embeddings to projections [b, D]."""

    filter: FilterConfig | None = None
    """The spectral filter in place of a learned predictor, if there is one."""

    row_wise: bool = True
    """The criterion is a mean over rows, so a mean over parts of a batch is exact."""

    def _use(self, predictor: nn.Module | FilterConfig) -> None:
        """Make predictions with a learned module [b, D] -> [b, D], or filter in the criterion."""
        if isinstance(predictor, FilterConfig):
            self.filter, self.row_wise = predictor, False
        else:
            self.predictor = predictor

    def _predict(self, z: Tensor) -> Tensor:
        """Projections [b, D] to what the criterion takes from the online branch."""
        if self.filter is not None:
            return z
        prediction: Tensor = self.predictor(z)
        return prediction

    @abstractmethod
    def branches(self, *views: Tensor) -> Branches:
        """Both branches for this rank's views, [b, C, H, W] each; the target carries no gradient
        unless the method says so."""

    @abstractmethod
    def criterion(self, online: Tensor, target: Tensor) -> Tensor:
        """Scalar loss from all of this rank's rows, as in Branches. Has no parameters."""

    def forward(self, *views: Tensor, online_gradient: Tensor | None = None) -> StepOutput:
        """The loss; or, given dL/d online, a scalar whose backward continues from there."""
        branches = self.branches(*views)
        if online_gradient is None:
            loss = self.criterion(branches.online, branches.target)
        else:
            loss = (branches.online * online_gradient).sum()
        return StepOutput(loss, branches)

    def update_target(self, momentum: float | Tensor) -> None:
        """Move the target weights after an optimizer step; most methods have none."""


def mean_negative_cosine(online: Tensor, target: Tensor) -> Tensor:
    """Mean over pairs of views and rows of -cos(online, target), without a filter.

    Args:
        online, target: [2 + k, b, D] and [2, b, D] of this rank, one dtype; no gradient reaches
            the target.

    Returns:
        Scalar float32.
    """
    with torch.autocast(online.device.type, enabled=False):
        losses = over_pairs(lambda rows: neg_cosine(online, rows), target.detach(), len(online))
        return losses.mean()
