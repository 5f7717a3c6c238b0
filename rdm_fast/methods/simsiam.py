"""SimSiam (arXiv:2011.10566), and RDM-SimSiam with a spectral filter in place of the predictor.

    L = D(p1, sg(z2)) / 2 + D(p2, sg(z1)) / 2,   D = negative cosine, p = predictor(z)

One encoder sees both views. The target is the other view's projection, without gradient.
"""

import torch
from torch import Tensor, nn

from rdm_fast.methods.base import Branches, Method


class SimSiam(Method):
    def branches(self, *views: Tensor) -> Branches:
        view1, view2 = views
        z1, z2 = self.projector(self.backbone(view1)), self.projector(self.backbone(view2))
        online = torch.stack([self.predictor(z1), self.predictor(z2)])
        projection = torch.stack([z1, z2]).detach()
        return Branches(online, projection.flip(0), projection)

    def loss(self, online: Tensor, target: Tensor | None) -> Tensor:
        # Without a predictor the targets are the online rows, which are then gathered only once.
        return super().loss(online, None if isinstance(self.predictor, nn.Identity) else target)
