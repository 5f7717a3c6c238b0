"""BYOL (arXiv:2006.07733), and RDM-BYOL with a spectral filter in place of the predictor.

    L = [2 - 2 cos(p1, z2')] + [2 - 2 cos(p2, z1')],   p = predictor(z), z' from the target weights

With small views (multi-crop, arXiv:2006.09882, section 3.3) each of their predictions is matched
with both targets, and L is twice the mean over all pairs.

The target weights follow the online ones by an exponential moving average, once an optimizer
step. Their batch norms normalize by the batch, as the online ones do, and keep their own
statistics.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from rdm_fast.filters.loss import Criterion
from rdm_fast.methods.base import Branches, Method
from rdm_fast.methods.ema import update_ema


class Byol(Method):
    def __init__(
        self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module, criterion: Criterion
    ) -> None:
        super().__init__(backbone, projector, predictor, criterion)
        self.target_backbone = deepcopy(backbone).requires_grad_(False)
        self.target_projector = deepcopy(projector).requires_grad_(False)

    def branches(self, *views: Tensor) -> Branches:
        z = [self.projector(self.backbone(view)) for view in views]
        with torch.no_grad():
            t1, t2 = (self.target_projector(self.target_backbone(view)) for view in views[:2])
        online = torch.stack([self.predictor(projections) for projections in z])
        return Branches(online, torch.stack([t2, t1]), torch.stack(z[:2]).detach())

    def loss(self, online: Tensor, target: Tensor | None) -> Tensor:
        return 4 + 4 * super().loss(online, target)

    def update_target(self, momentum: float | Tensor, branches: Branches) -> None:
        update_ema(self.target_backbone, self.backbone, momentum)
        update_ema(self.target_projector, self.projector, momentum)
