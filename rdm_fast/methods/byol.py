"""BYOL (arXiv:2006.07733), and RDM-BYOL with a spectral filter for the predictor.

    L = [2 - 2 cos(p1, z2')] + [2 - 2 cos(p2, z1')],   p = predictor(z), z' from the target weights

The target weights follow the online ones by an exponential moving average, once an optimizer
step. Their batch norms use the batch, like the online ones', and keep statistics of their own.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from rdm_fast.config import FilterConfig
from rdm_fast.ema import update_ema
from rdm_fast.methods.base import Branches, Method, mean_negative_cosine
from rdm_fast.spectral import spectral_cosine


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

    def branches(self, view1: Tensor, view2: Tensor) -> Branches:
        z1, z2 = self.projector(self.backbone(view1)), self.projector(self.backbone(view2))
        with torch.no_grad():
            t1 = self.target_projector(self.target_backbone(view1))
            t2 = self.target_projector(self.target_backbone(view2))
        projection = torch.stack([z1, z2]).detach()
        return Branches(
            torch.stack([self._predict(z1), self._predict(z2)]), torch.stack([t2, t1]), projection
        )

    def criterion(self, online: Tensor, target: Tensor) -> Tensor:
        if self.filter:
            return 4 + 4 * spectral_cosine(online, target, self.filter).mean()
        return 4 + 4 * mean_negative_cosine(online, target)

    def update_target(self, momentum: float | Tensor) -> None:
        update_ema(self.target_backbone, self.backbone, momentum)
        update_ema(self.target_projector, self.projector, momentum)
