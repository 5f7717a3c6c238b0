"""BYOL (arXiv:2006.07733), and RDM-BYOL with a spectral filter for the predictor.

    L = [2 - 2 cos(p1, z2')] + [2 - 2 cos(p2, z1')],   p = predictor(z), z' from the target weights

With small views (multi-crop, arXiv:2006.09882, section 3.3) each of their predictions is matched
with both targets, and L is twice the mean over all pairs.

The target weights follow the online ones by an exponential moving average, once an optimizer
step. Their batch norms use the batch, like the online ones', and keep statistics of their own.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from rdm_fast.config import FilterConfig
from rdm_fast.filters.loss import spectral_cosine
from rdm_fast.methods.base import Branches, Method, mean_negative_cosine
from rdm_fast.methods.ema import update_ema


class Byol(Method):
    def __init__(
        self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | FilterConfig
    ) -> None:
        """predictor: a learned module [b, D] -> [b, D], or the spectral filter to use instead."""
        super().__init__()
        self.backbone, self.projector = backbone, projector
        self.target_backbone = deepcopy(backbone).requires_grad_(False)
        self.target_projector = deepcopy(projector).requires_grad_(False)
        self._use(predictor)

    def branches(self, *views: Tensor) -> Branches:
        z = [self.projector(self.backbone(view)) for view in views]
        with torch.no_grad():
            t1, t2 = (self.target_projector(self.target_backbone(view)) for view in views[:2])
        online = torch.stack([self._predict(projections) for projections in z])
        return Branches(online, torch.stack([t2, t1]), torch.stack(z[:2]).detach())

    def criterion(self, online: Tensor, target: Tensor) -> Tensor:
        if self.filter:
            return 4 + 4 * spectral_cosine(online, target, self.filter).mean()
        return 4 + 4 * mean_negative_cosine(online, target)

    def update_target(self, momentum: float | Tensor) -> None:
        update_ema(self.target_backbone, self.backbone, momentum)
        update_ema(self.target_projector, self.projector, momentum)
