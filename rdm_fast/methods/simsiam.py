"""SimSiam (arXiv:2011.10566), and RDM-SimSiam with a spectral filter for the predictor.

    L = D(p1, sg(z2)) / 2 + D(p2, sg(z1)) / 2,   D = negative cosine, p = predictor(z)

One encoder sees both views. The target is the other view's projection, without gradient.
"""

import torch
from torch import Tensor, nn

from rdm_fast.config import FilterConfig
from rdm_fast.filters.loss import spectral_cosine
from rdm_fast.methods.base import Branches, Method, mean_negative_cosine


class SimSiam(Method):
    def __init__(
        self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | FilterConfig
    ) -> None:
        """predictor: a learned module [b, D] -> [b, D], or the spectral filter to use instead."""
        super().__init__()
        self.backbone, self.projector = backbone, projector
        self._use(predictor)

    def branches(self, *views: Tensor) -> Branches:
        view1, view2 = views
        z1, z2 = self.projector(self.backbone(view1)), self.projector(self.backbone(view2))
        target = torch.stack([z2, z1]).detach()
        return Branches(torch.stack([self._predict(z1), self._predict(z2)]), target, target.flip(0))

    def criterion(self, online: Tensor, target: Tensor) -> Tensor:
        if self.filter:  # the target is the other view's online rows: gathered once
            return spectral_cosine(online, None, self.filter).mean()
        return mean_negative_cosine(online, target)
