"""DINO (arXiv:2104.14294): targets from averaged weights, centered and sharpened.

    q = softmax((l' - c) / tau)      l' = z' C'^T, of the target weights
    c <- m c + (1 - m) mean of l', over both views of the global batch

Backbone, head and prototypes have target weights, which follow the online ones as BYOL's do. Their
batch norms normalize by the batch. They see the two large views, the online network all.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from rdm_fast.config import FilterConfig, PrototypesConfig
from rdm_fast.methods.base import Branches
from rdm_fast.methods.ema import update_ema
from rdm_fast.methods.prototypes import PrototypeMethod, Prototypes, unit_rows


class Dino(PrototypeMethod):
    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        prototypes: Prototypes,
        settings: PrototypesConfig,
        filter: FilterConfig | None = None,
    ) -> None:
        super().__init__(backbone, projector, prototypes, settings, filter)
        self.target_backbone = deepcopy(backbone).requires_grad_(False)
        self.target_projector = deepcopy(projector).requires_grad_(False)
        self.target_prototypes = deepcopy(prototypes).requires_grad_(False)

    @property
    def assigning(self) -> Prototypes:
        return self.target_prototypes

    def temperature_at(self, epoch: float) -> float:
        start, end = self.settings.teacher_temp_start, self.settings.teacher_temp
        length = self.settings.teacher_temp_epochs
        return end if epoch >= length else start + (end - start) * epoch / length

    def branches(self, *views: Tensor) -> Branches:
        logits, projection = self.online(views)
        with torch.no_grad():
            t1, t2 = (self.target_projector(self.target_backbone(view)) for view in views[:2])
        return Branches(logits, unit_rows(torch.stack([t2, t1])), projection)

    def update_target(self, momentum: float | Tensor, branches: Branches) -> None:
        super().update_target(momentum, branches)  # the center takes this step's target weights
        update_ema(self.target_backbone, self.backbone, momentum)
        update_ema(self.target_projector, self.projector, momentum)
        update_ema(self.target_prototypes, self.prototypes, momentum)
