"""SwAV (arXiv:2006.09882): the target is the other view's assignment, by Sinkhorn.

One network sees all views. Sinkhorn assigns each view's rows of the global batch, and of the queue,
so that every prototype is used equally.
"""

from torch import Tensor

from rdm_fast.methods.base import Branches
from rdm_fast.methods.prototypes import PrototypeMethod


class Swav(PrototypeMethod):
    def branches(self, *views: Tensor) -> Branches:
        logits, projection = self.online(views)
        return Branches(logits, projection.flip(0), projection)

    def target_logits(self, branches: Branches) -> Tensor:
        if self.location == "online":
            return super().target_logits(branches)
        return branches.online[: len(branches.target)].flip(0)
