"""One optimizer step: both branches, the loss, its gradient over all ranks, the update.

Backbone and heads run under autocast; the criterion leaves it. A step in several parts
(optim.accumulate) gives the gradient of the whole batch: where the criterion is a mean over rows,
parts are simply added; where it needs all rows at once, as a spectral filter does, branches run
once without gradient, the criterion gives dL/d online for all rows, and each part is then run
again and differentiated from there.

A step whose loss or gradient is not finite changes nothing: no weight, no running statistic.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rdm_fast.batchnorm import frozen_running_statistics, synchronise
from rdm_fast.config import Config
from rdm_fast.data.batch import Batch
from rdm_fast.distributed import world_size
from rdm_fast.ema import ema_momentum
from rdm_fast.methods import Branches, Method, StepOutput
from rdm_fast.optim import build_optimizer, learning_rate, set_learning_rate
from rdm_fast.parallel import wrap

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class StepReport:
    """What a step did; tensors stay on the device."""

    loss: Tensor  # scalar, this rank's
    grad_norm: Tensor  # scalar, of the gradient averaged over ranks, not scaled
    applied: bool  # False: not finite, and nothing was changed
    branches: Branches  # all rows of this rank, detached
    lr: float
    ema_momentum: float


class TrainStep:
    """Method, optimizer and loss scaling of a run, and how one batch moves them.

    Attributes:
        method: the module whose state is the run's; not wrapped.
        optimizer, scaler: as in torch.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(
        self, method: Method, config: Config, device: torch.device, steps_per_epoch: int
    ) -> None:
        if config.sync_bn and world_size() > 1:
            method = synchronise(method, device)  # type: ignore[assignment]
        self.method = method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config, self.device = config, device
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * config.optim.epochs
        self.parallel = wrap(self.method, config, device)
        self.optimizer = build_optimizer(self.method, config.optim, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self._parameters = [p for p in self.method.parameters() if p.requires_grad]
        self._statistics = list(self.method.buffers())
        self._kept = [b.clone() for b in self._statistics]

    def momentum(self, step: int) -> float:
        """Momentum of the target weights in step number `step`."""
        optim = self.config.optim
        return ema_momentum(step, self.total_steps, optim.ema_start, optim.ema_end)

    def __call__(self, batch: Batch, step: int) -> StepReport:
        """Compute and, if it is finite, apply step number `step` (from 0)."""
        lr = learning_rate(step, self.steps_per_epoch, self.config.optim)
        momentum = self.momentum(step)
        set_learning_rate(self.optimizer, lr)
        torch._foreach_copy_(self._kept, self._statistics)

        loss, branches = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters])
        # The only wait of a step that is not logged: an update cannot be taken back.
        applied = bool((norm.isfinite() & loss.isfinite()).item())
        if applied:
            self.scaler.step(self.optimizer)
            self.method.update_target(momentum)
        else:
            torch._foreach_copy_(self._statistics, self._kept)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepReport(loss, norm, applied, branches, lr, momentum)

    # ---- the gradient ------------------------------------------------------------------------

    def _forward(
        self, module: nn.Module, view1: Tensor, view2: Tensor, gradient: Tensor | None = None
    ) -> StepOutput:
        dtype = AUTOCAST[self.config.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return module(view1, view2, gradient)

    def _backward(self, batch: Batch) -> tuple[Tensor, Branches]:
        """Leave this rank's share of the averaged gradient in `.grad`; loss and branches."""
        parts = self.config.optim.accumulate
        if parts == 1:
            output = self._forward(self.parallel, batch.view1, batch.view2)
            self.scaler.scale(output.loss).backward()
            return output.loss.detach(), _detached([output.branches])
        views = list(zip(batch.view1.chunk(parts), batch.view2.chunk(parts), strict=True))
        if self.method.row_wise:
            outputs = []
            for i, (view1, view2) in enumerate(views):
                with self._no_sync(i < parts - 1):
                    output = self._forward(self.parallel, view1, view2)
                    self.scaler.scale(output.loss / parts).backward()
                    outputs.append(output)
            loss = torch.stack([output.loss.detach() for output in outputs]).mean()
            return loss, _detached([output.branches for output in outputs])
        return self._backward_through_whole_batch(views)

    def _backward_through_whole_batch(
        self, views: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Branches]:
        """Two passes over the parts, the criterion in between."""
        with torch.no_grad(), frozen_running_statistics(self.method):
            branches = _detached([self._forward(self.method, *part).branches for part in views])
        online = branches.online.requires_grad_()
        loss = self.method.criterion(online, branches.target)
        self.scaler.scale(loss).backward()
        assert online.grad is not None
        gradients = online.grad.chunk(len(views), dim=1)
        for i, (part, gradient) in enumerate(zip(views, gradients, strict=True)):
            with self._no_sync(i < len(views) - 1):
                self._forward(self.parallel, *part, gradient).loss.backward()
        return loss.detach(), _detached([branches])

    def _no_sync(self, condition: bool) -> contextlib.AbstractContextManager[None]:
        if condition and isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    # ---- resuming exactly --------------------------------------------------------------------

    def settle(self) -> None:
        """Make the gradient's sum over ranks associate as it will in every later step.

        DistributedDataParallel lays out its buckets anew after the first backward pass, so the
        first step of a process would round differently from the same step of a process that has
        run for long, and a resumed run would differ from an undisturbed one. Two backward passes
        on noise bring every process to the final layout; they leave no trace.
        """
        if not isinstance(self.parallel, DistributedDataParallel):
            return
        torch._foreach_copy_(self._kept, self._statistics)
        augment, rows = self.config.augment, self.config.optim.local_batch(world_size())
        generator = torch.Generator().manual_seed(0)
        shape = (rows // self.config.optim.accumulate, augment.channels, augment.size, augment.size)
        noise = torch.randn(shape, generator=generator).to(self.device)
        for _ in range(2):
            self._forward(self.parallel, noise, noise.flip(0)).loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_copy_(self._statistics, self._kept)


def _detached(parts: list[Branches]) -> Branches:
    """All parts' rows in one, without gradient."""
    return Branches(
        *(
            torch.cat([getattr(part, name) for part in parts], dim=1).detach()
            for name in ("online", "target", "projection")
        )
    )
