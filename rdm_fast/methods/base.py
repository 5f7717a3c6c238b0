"""A method: two branches, each a function of one image, and a criterion on the whole batch.

Because of this split a step can run its branches part by part (gradient accumulation) and still
be the step of the whole batch: the criterion sees all rows at once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from rdm_fast.config.run import Branch
from rdm_fast.filters.loss import Criterion
from rdm_fast.spectrum import BranchSpectra, branch_spectra


@dataclass
class Branches:
    """The outputs of both branches, before any spectral filter or softmax.

    online: [2 + k, b, D]; target, projection: [2, b, D]. online[v] is matched with target[v],
    which comes from the other view; each of k small views (multi-crop) is matched with both
    targets. projection is the online encoder's output for either view, detached, for telemetry.
    """

    online: Tensor
    target: Tensor
    projection: Tensor
    codes: Tensor | None = None
    """Of DINO and SwAV: the assignments [2, b, K] that target became in the loss."""


@dataclass
class StepOutput:
    """The loss of this rank's rows, to be differentiated, and the branches it came from."""

    loss: Tensor
    branches: Branches


class Encoder(NamedTuple):
    """A branch's networks: from views to embeddings, and from these to projections."""

    backbone: nn.Module
    projector: nn.Module


class Method(nn.Module, ABC):
    """From two or more views of the same images to the loss.

    Attributes:
        backbone: from views [b, C, H, W] to embeddings [b, d_emb]; what evaluation uses.
        projector: from embeddings to projections [b, D].
        predictor: from projections to the online branch's output; nn.Identity with a filter.
        criterion: the loss between the branches.
    """

    def __init__(
        self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module, criterion: Criterion
    ) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector
        self.predictor, self.criterion = predictor, criterion

    @property
    def encoders(self) -> dict[Branch, Encoder]:
        """The networks of each branch that has weights of its own."""
        found: dict[Branch, Encoder] = {"online": Encoder(self.backbone, self.projector)}
        if hasattr(self, "target_backbone"):
            target = (self.get_submodule(f"target_{part}") for part in Encoder._fields)
            found["target"] = Encoder(*target)
        return found

    @abstractmethod
    def branches(self, *views: Tensor) -> Branches:
        """Both branches for this rank's views, [b, C, H, W] each; targets carry no gradient."""

    def loss(self, online: Tensor, target: Tensor | None) -> Tensor:
        """Scalar loss of all of this rank's rows, as in Branches; arguments as for a Criterion."""
        losses: Tensor = self.criterion(online, target)
        return losses.mean()

    def forward(self, *views: Tensor, online_gradient: Tensor | None = None) -> StepOutput:
        """The loss; or, given dL/d online, a scalar whose backward continues from there."""
        branches = self.branches(*views)
        if online_gradient is None:
            loss = self.loss(branches.online, branches.target)
        else:
            loss = (branches.online * online_gradient).sum()
        return StepOutput(loss, branches)

    def schedule(self, step: int, steps_per_epoch: int) -> None:
        """Set what depends on the number of the step, from 0, in tensors on the device."""

    def frozen(self) -> tuple[list[nn.Parameter], Tensor] | None:
        """Parameters that a step leaves alone where this flag on the device is set."""
        return None

    def update_target(self, momentum: float | Tensor, branches: Branches) -> None:
        """Move the target's weights and statistics after a step; most methods have none.

        Args:
            momentum: of the target weights.
            branches: all rows of this rank in the step.
        """

    def spectra(self, branches: Branches, *, profile: bool = False) -> BranchSpectra:
        """Spectra of both branches' outputs; every rank must call it at the same step."""
        b = branches
        config = self.criterion.applied
        return branch_spectra(b.online, b.target, b.projection, config, profile=profile)
