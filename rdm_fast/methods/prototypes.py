"""Methods that compare two views by how alike they are to K prototypes: DINO and SwAV.

    z = normalize(head(backbone(x)))      l = z C^T, C = rows of V, normalized
    L = -mean over pairs and rows of sum_k q_k log softmax(l / temperature)_k

The online output is softmax(l / temperature). The target output q is made from the target branch's
z, which no gradient reaches, by `prototypes.centring`: a softmax, with or without a center, or
Sinkhorn over the global batch. A spectral filter may come before the prototypes of either branch.
`Branches.target` holds z, not the logits, so all that ranks exchange is D wide.
"""

from collections.abc import Iterable
from math import sqrt

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_fast.config import FilterConfig, PrototypesConfig
from rdm_fast.config.run import Branch
from rdm_fast.filters.loss import Criterion, SpectralPredictor
from rdm_fast.methods.base import Branches, Method, StepOutput
from rdm_fast.runtime.distributed import gather_rows, local_rows, world_size
from rdm_fast.spectrum import BranchSpectra, PrototypeOutputs, assignment_spectra
from rdm_kernels import centered_softmax, prototype_logits, prototype_loss, sinkhorn

PART = {"mean": "centring", "none": "centring", "sinkhorn": "equipartition"}
"""Of the rank difference, by what keeps the prototypes in equal use."""


def unit_rows(x: Tensor) -> Tensor:
    """Rows divided by their lengths, in float32 also under autocast (float64 for float64)."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class Prototypes(nn.Module):
    """Cosines of unit rows with K prototypes, which are the directions of the weight's rows.

    Logits are float32. Under autocast their factors have 16 bits.
    """

    def __init__(self, count: int, D: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, D).uniform_(-1 / sqrt(D), 1 / sqrt(D)))
        self.dtype = dtype

    def forward(self, z: Tensor) -> Tensor:
        """Logits [..., K] of unit rows z [..., D]."""
        return prototype_logits(z, unit_rows(self.weight), self.dtype)


class CrossEntropy(Criterion):
    """Mean cross-entropy over all matched pairs of views, of logits with assignments q."""

    def __init__(self, temperature: float, *, row_wise: bool) -> None:
        super().__init__()
        self.temperature, self.row_wise = temperature, row_wise

    def forward(self, online: Tensor, target: Tensor | None = None) -> Tensor:
        """online: logits, [v, b, K]; target: q, [t, b, K], matched as in Branches. A scalar."""
        assert target is not None
        v, t = len(online), len(target)
        loss = prototype_loss(online, target.to(online.dtype), self.temperature)
        return loss.sum() / (t + (v - t) * t)


class Queue(nn.Module):
    """The last rows of either view's targets, the same on every rank.

    Attributes:
        rows: [2, Q, D]; a ring that the next batch goes on with.
        seen: rows of a view that entered so far, a scalar.
        wanted: whether the queue takes part once it is full; set before each step.
    """

    rows: Tensor
    seen: Tensor
    wanted: Tensor

    def __init__(self, size: int, D: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(2, size, D))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("wanted", torch.zeros((), dtype=torch.bool), persistent=False)

    def scores(self, prototypes: Prototypes) -> Tensor:
        """Logits of all rows, [2, Q, K], or -inf while the queue takes no part."""
        used = self.wanted & (self.seen >= self.rows.shape[1])
        return prototypes(self.rows).where(used, -torch.inf)

    def push(self, rows: Tensor) -> None:
        """Replace the oldest rows by those of a global batch, [2, B, D]."""
        B = rows.shape[1]
        at = (self.seen + torch.arange(B, device=rows.device)) % self.rows.shape[1]
        self.rows.index_copy_(1, at, rows.to(self.rows.dtype))
        self.seen += B


class PrototypeMethod(Method):
    """What DINO and SwAV share: head, prototypes, target map, loss, and their state.

    Attributes:
        projector: the head, without the normalization that follows.
        prototypes: of the online branch.
        predictor: a spectral filter of the rows of `location`, before the prototypes, or nothing.
        target_temperature: of the target map, a scalar on the device; set before each step.
        center: [K], or None.
        queue: earlier targets, or None.
    """

    target_temperature: Tensor
    are_frozen: Tensor
    center: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        prototypes: Prototypes,
        settings: PrototypesConfig,
        filter: FilterConfig | None = None,
    ) -> None:
        row_wise = filter is None and settings.centring != "sinkhorn"
        criterion = CrossEntropy(settings.temperature, row_wise=row_wise)
        predictor: nn.Module = nn.Identity()
        if filter is not None:
            predictor = SpectralPredictor(filter)
            criterion.selector = predictor.selector
        super().__init__(backbone, projector, predictor, criterion)
        self.location = filter.location if filter else None
        self.prototypes, self.settings = prototypes, settings
        count, D = prototypes.weight.shape
        self.register_buffer("target_temperature", torch.tensor(1.0), persistent=False)
        self.register_buffer("are_frozen", torch.tensor(False), persistent=False)
        self.register_buffer("center", torch.zeros(count) if settings.centring == "mean" else None)
        self.queue = Queue(settings.queue, D) if settings.queue else None
        self.schedule(0, 1)
        self._codes: Tensor | None = None  # q of the last loss
        self._gathered: Tensor | None = None  # and the global batch's targets it is made from

    @property
    def assigning(self) -> Prototypes:
        """Those that targets are compared with."""
        return self.prototypes

    # ---- schedules -----------------------------------------------------------------------------

    def temperature_at(self, epoch: float) -> float:
        """Temperature of the targets after so many epochs."""
        return self.settings.epsilon

    def schedule(self, step: int, steps_per_epoch: int) -> None:
        epoch = step / steps_per_epoch
        self.target_temperature.fill_(self.temperature_at(epoch))
        self.are_frozen.fill_(epoch < self.settings.frozen_epochs)
        if self.queue is not None:
            self.queue.wanted.fill_(epoch >= self.settings.queue_epoch)

    def frozen(self) -> tuple[list[nn.Parameter], Tensor] | None:
        return ([self.prototypes.weight], self.are_frozen) if self.settings.frozen_epochs else None

    # ---- the loss ------------------------------------------------------------------------------

    def online(self, views: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of all views with gradient, and the rows of the first two without."""
        z = unit_rows(torch.stack([self.projector(self.backbone(view)) for view in views]))
        return self.prototypes(self.filtered(z, "online")), z[:2].detach()

    def filtered(self, z: Tensor, branch: Branch) -> Tensor:
        """Unit rows [v, b, D] after the spectral filter, if this branch has one."""
        if branch != self.location:
            return z
        return unit_rows(torch.stack([self.predictor(rows) for rows in z]))

    @torch.no_grad()
    def assign(self, target: Tensor) -> Tensor:
        """Assignments q [2, b, K] of this rank's target rows [2, b, D]."""
        prototypes, how = self.assigning, self.settings
        target = self.filtered(target, "target")
        if how.centring != "sinkhorn":
            return centered_softmax(prototypes(target), self.center, self.target_temperature)
        rows = self._gathered = gather_rows(target)
        scores = prototypes(rows)
        if self.queue is not None:
            scores = torch.cat([scores, self.queue.scores(prototypes)], dim=1)
        q = sinkhorn(scores, self.target_temperature, how.iterations)
        return q[:, local_rows(target.shape[1])].contiguous()

    def loss(self, online: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        self._codes = self.assign(target)
        return super().loss(online, self._codes)

    def forward(self, *views: Tensor, online_gradient: Tensor | None = None) -> StepOutput:
        output = super().forward(*views, online_gradient=online_gradient)
        if online_gradient is None:
            output.branches.codes = self._codes
        return output

    # ---- after the step ------------------------------------------------------------------------

    @torch.no_grad()
    def update_target(self, momentum: float | Tensor, branches: Branches) -> None:
        """Move the center and the queue."""
        if branches.codes is None:
            branches.codes = self._codes
        if self.center is not None:
            mean = branches.target.mean(dim=(0, 1))  # logits are linear: so is their mean
            if world_size() > 1:
                dist.all_reduce(mean)
                mean /= world_size()
            logits = self.assigning(mean[None])[0]
            self.center.lerp_(logits.to(self.center.dtype), 1 - self.settings.center_momentum)
        if self.queue is not None and self._gathered is not None:
            self.queue.push(self._gathered)
        self._codes = self._gathered = None

    @torch.no_grad()
    def spectra(self, branches: Branches, *, profile: bool = False) -> BranchSpectra:
        """Of the outputs after the softmax; the response is that of the target map."""
        how, codes = self.settings, branches.codes
        outputs = PrototypeOutputs(
            online=branches.online[: len(branches.projection)],
            target=self.assign(branches.target) if codes is None else codes,
            temperature=how.temperature,
            target_temperature=self.target_temperature,
            averaged="target" in self.encoders,
            map="" if self.location else PART[how.centring],
            center=self.center,
        )
        target_logits = self.target_logits(branches) if profile else None
        return assignment_spectra(outputs, branches.projection, target_logits)

    def target_logits(self, branches: Branches) -> Tensor:
        """What the targets were made from, [2, b, K]."""
        return self.assigning(branches.target)
