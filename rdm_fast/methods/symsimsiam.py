"""SymSimSiam: the paper's symmetric control (arXiv:2303.02387, section 3).

    L = -mean_b cos(z1_b - mean(z1), z2_b - mean(z2))

No predictor and no stop-gradient: both branches are alike, so there is no rank difference.
Centering alone keeps it from collapsing completely; its effective rank stays low.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_fast.filters.loss import Criterion
from rdm_fast.methods.base import Branches, Method
from rdm_fast.runtime.distributed import gather_rows, local_rows, world_size


class SymSimSiam(Method):
    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__(backbone, projector, nn.Identity(), CenteredCosine())

    def branches(self, *views: Tensor) -> Branches:
        """Both branches carry gradient, through `online`; target is the same rows, detached."""
        view1, view2 = views
        z1, z2 = self.projector(self.backbone(view1)), self.projector(self.backbone(view2))
        online = torch.stack([z1, z2])
        return Branches(online, online.detach().flip(0), online.detach())


class CenteredCosine(Criterion):
    """Mean negative cosine of the two online views, each centered by its mean over all ranks."""

    row_wise = False

    def forward(self, online: Tensor, target: Tensor | None = None) -> Tensor:
        """online: this rank's rows, [2, b, D]; the target is not used. Returns a scalar."""
        with torch.autocast(online.device.type, enabled=False):
            rows = z = online.to(torch.promote_types(online.dtype, torch.float32))
            if world_size() > 1:  # this rank's rows are live, the others' are constants
                rows = gather_rows(z).clone()
                rows[:, local_rows(z.shape[1])] = z
            z1, z2 = rows - rows.mean(dim=1, keepdim=True)
            loss = -F.cosine_similarity(z1, z2, dim=1).mean()
            # The global loss; DistributedDataParallel divides its gradient by the ranks.
            return world_size() * loss - (world_size() - 1) * loss.detach()
