"""SimSiam (arXiv:2011.10566), and RDM-SimSiam with a spectral filter in place of the predictor.

    L = D(p1, sg(z2)) / 2 + D(p2, sg(z1)) / 2,   D = negative cosine, p = predictor(z)

One encoder sees both views. The target is the other view's projection, without gradient.
Each small view (multi-crop, arXiv:2006.09882, section 3.3) is matched with both targets and is
none itself; L is then the mean of D over all pairs.
"""

import torch
from torch import Tensor, nn

from rdm_fast.methods.base import Branches, Method


class SimSiam(Method):
    def branches(self, *views: Tensor) -> Branches:
        z = [self.projector(self.backbone(view)) for view in views]
        online = torch.stack([self.predictor(projections) for projections in z])
        projection = torch.stack(z[:2]).detach()
        return Branches(online, projection.flip(0), projection)

    def loss(self, online: Tensor, target: Tensor | None) -> Tensor:
        # Without a predictor the targets are the online rows, which are then gathered only once.
        return super().loss(online, None if isinstance(self.predictor, nn.Identity) else target)
