"""One optimizer step: both branches, the loss, its gradient over all ranks, the update.

Backbone and heads run under autocast, the criterion does not. A step in several parts
(optim.accumulate) gives the gradient of the whole batch. If the criterion is a mean over rows, the
parts' gradients are added. A spectral filter needs all rows at once: the branches run once without
gradient, the criterion gives dL/d online for all rows, and each part runs again and is
differentiated from there.

A step whose loss or gradient is not finite changes nothing: no weight, no running statistic. The
device decides this itself. Nothing in a step waits for the device, so the whole step can be
recorded as one CUDA graph (`rdm_fast.training.cuda_graph`).
"""

import contextlib
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rdm_fast.config import Config
from rdm_fast.data.loaders.batch import Batch
from rdm_fast.errors import Unavailable, message_of
from rdm_fast.methods import Branches, Method, StepOutput
from rdm_fast.methods.ema import ema_momentum
from rdm_fast.models.backbone import memory_format
from rdm_fast.models.batchnorm import frozen_running_statistics, join_buffers, synchronize
from rdm_fast.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
    set_weight_decay,
    undone_where,
    weight_decay,
)
from rdm_fast.runtime.distributed import rank, world_size
from rdm_fast.runtime.host_copy import HostCopy
from rdm_fast.runtime.precision import autocast, float32_products
from rdm_fast.runtime.printing import warn
from rdm_fast.training.cuda_graph import StepGraph
from rdm_fast.training.ddp import wrap

Views = tuple[Tensor, ...]
"""This rank's views of a batch, [b, C, S, S] each: the two views, then any small ones."""
COMPILE = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}  # torch's names


@dataclass
class Outputs:
    """The results of a step on the device."""

    loss: Tensor  # scalar, this rank's
    grad_norm: Tensor  # scalar, of the gradient averaged over ranks, not scaled
    flags: Tensor  # [4] float32, 0 or as in StepReport
    branches: Branches  # all rows of this rank, detached


@dataclass
class StepReport:
    """What a step did. Its tensors are on the device; the next step may overwrite them."""

    number: int  # from 0
    loss: Tensor  # scalar, this rank's
    grad_norm: Tensor  # scalar, of the gradient averaged over ranks, not scaled
    branches: Branches  # all rows of this rank, detached
    lr: float
    ema_momentum: float
    skipped: Tensor  # scalar, 1 where the step changed nothing
    flags: HostCopy
    """[4], the same on every rank: whether gradient and loss are not finite, 1 + the number of a
    rank that had no batch, and whether any rank was asked to stop. Reading waits for the step."""

    @property
    def applied(self) -> bool:
        """False if the step changed nothing."""
        return not self.flags.read()[:3].any()

    @property
    def loss_is_finite(self) -> bool:
        """Whether it is on every rank."""
        return not self.flags.read()[1]

    @property
    def lost(self) -> int:
        """1 + the number of a rank that had no batch; 0 if all had one."""
        return int(self.flags.read()[2])

    @property
    def stop(self) -> bool:
        """Whether any rank was asked to stop before this step."""
        return bool(self.flags.read()[3])


class TrainStep:
    """Method, optimizer and loss scaling of a run, updated by one batch at a time.

    Attributes:
        method: the unwrapped module.
        optimizer, scaler: as in torch.
        total_steps: optimizer steps of the whole run.
        graph: the step as a CUDA graph, or None if steps are not recorded.

    Raises:
        Unavailable: step.graph=on, and this step cannot be recorded.
    """

    def __init__(
        self, method: Method, config: Config, device: torch.device, steps_per_epoch: int
    ) -> None:
        if config.sync_bn and world_size() > 1:
            method = synchronize(method, device)  # type: ignore[assignment]
        self.method = method.to(device, memory_format=memory_format(method.backbone))  # type: ignore[call-overload]
        self.config, self.device = config, device
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * config.optim.epochs
        self._statistics = join_buffers(self.method)
        self._kept = [statistics.clone() for statistics in self._statistics]
        if config.step.compile != "none":
            for part in self.method.children():
                # torch gives up on a graph without operators, and then on those of other parts
                if next(part.parameters(), None) is not None:
                    part.compile(mode=COMPILE[config.step.compile], dynamic=False)
        self.parallel = wrap(self.method, config, device)
        self.optimizer = build_optimizer(self.method, config.optim, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self._parameters = [p for p in self.method.parameters() if p.requires_grad]
        self._skip = torch.zeros((), device=device)
        self._notes = torch.zeros(2, device=device)  # the last two of the flags
        self.optimizer.found_inf = self._skip  # type: ignore[attr-defined]
        self._momentum = torch.zeros((), dtype=torch.float64, device=device)
        self.selector = self.method.criterion.selector
        self.graph = self._build_graph()

    def ema_momentum(self, step: int) -> float:
        """Momentum of the target weights in step number `step`."""
        optim = self.config.optim
        return ema_momentum(step, self.total_steps, optim.ema_start, optim.ema_end)

    def __call__(
        self, batch: Batch, step: int, *, lost: bool = False, stop: bool = False
    ) -> StepReport:
        """Compute and, if it is finite, apply step number `step` (from 0).

        Args:
            batch: this rank's.
            step: its number.
            lost: the batch is noise, as this rank has lost its images: no rank applies the step.
            stop: this rank was asked to stop, which the others learn with this step.
        """
        if lost:
            self._notes[0] = rank() + 1
        if stop:
            self._notes[1] = 1
        lr = learning_rate(step, self.steps_per_epoch, self.config.optim)
        decay = weight_decay(step, self.steps_per_epoch, self.config.optim)
        momentum = self.ema_momentum(step)
        set_learning_rate(self.optimizer, lr)
        set_weight_decay(self.optimizer, decay)
        self._momentum.fill_(momentum)
        self.method.schedule(step, self.steps_per_epoch)
        done = self._run(*batch.views)
        return StepReport(
            number=step,
            loss=done.loss,
            grad_norm=done.grad_norm,
            branches=done.branches,
            lr=lr,
            ema_momentum=momentum,
            skipped=self._skip,
            flags=HostCopy(done.flags),
        )

    def _step(self, *views: Tensor) -> Outputs:
        """The device's work in a step."""
        torch._foreach_copy_(self._kept, self._statistics)
        with float32_products(self.config.precision, self.device):
            loss, branches = self._backward(views)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters]
        norm = torch.nn.utils.get_total_norm(gradients)
        not_finite = 1 - torch.stack([norm.isfinite(), loss.isfinite()]).float()
        flags = torch.cat([not_finite, self._notes])
        if world_size() > 1:  # the gradient is averaged already, the loss is this rank's
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self._skip.copy_(flags[:3].amax().clamp_max(1))
        clip_gradients(gradients, norm, self.config.optim)
        frozen = self.method.frozen()
        with undone_where(frozen, self.optimizer) if frozen else contextlib.nullcontext():
            self.optimizer.step()
        self.method.update_target(self._momentum.where(self._skip == 0, 1), branches)
        for statistics, kept in zip(self._statistics, self._kept, strict=True):
            statistics.copy_(torch.where(self._skip == 0, statistics, kept))
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Outputs(loss, norm, flags, branches)

    def uncompiled(self) -> contextlib.AbstractContextManager[object]:
        """A context without torch.compile, for shapes other than a step's."""
        if self.config.step.compile == "none":
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    # ---- recording ---------------------------------------------------------------------------

    def _run(self, *views: Tensor) -> Outputs:
        """`_step`, as a CUDA graph if there is one and its engine is accurate."""
        if self.graph and not self.graph.is_recorded:
            self._drop_graph_without_gemm()  # reads the last status: recording must not wait
        if self.graph is None:
            return self._step(*views)
        try:
            done = self.graph(*views)
        except RuntimeError as error:  # some library cannot be captured on this device
            if self.config.step.graph == "on" or self.graph.is_recorded:
                raise
            why = f"steps run without a CUDA graph, as recording failed: {message_of(error)}"
            warn(why, stacklevel=3)
            self.graph = None
            self.optimizer.zero_grad(set_to_none=True)
            return self._step(*views)
        if self.selector and self.graph.is_recorded:
            self._drop_graph_without_gemm()  # by the last step's status, while this one runs
            self.selector.watch_replay()
        return done

    def _drop_graph_without_gemm(self) -> None:
        if self.selector and self.selector.current(self.device) != "gemm":
            self.graph = None

    def _build_graph(self) -> StepGraph[Outputs] | None:
        asked = self.config.step.graph
        obstacle = self._why_not_recorded()
        if asked == "on" and obstacle:
            raise Unavailable(
                f"--step.graph on: a CUDA graph cannot hold a step {obstacle}: "
                "use --step.graph auto"
            )
        return None if asked == "off" or obstacle else StepGraph(self._step)

    def _why_not_recorded(self) -> str | None:
        if self.device.type != "cuda":
            return "on a CPU"
        if world_size() > 1:
            return "of several ranks"
        if self.config.optim.accumulate > 1:
            return "in several parts (optim.accumulate)"
        if self.config.log.probe:
            return "with an online probe (log.probe), which hooks into the backbone"
        if self.config.optim.backend == "apex":
            return "with optim.backend=apex, which keeps its settings on the host"
        if self.selector and (engine := self.selector.current(self.device)) != "gemm":
            return f"with filter.engine={engine}, which waits for the device"
        return None

    # ---- the gradient ------------------------------------------------------------------------

    def _forward(
        self, module: nn.Module, views: Views, gradient: Tensor | None = None
    ) -> StepOutput:
        with autocast(self.config.precision, self.device):
            return module(*views, online_gradient=gradient)

    def _backward(self, views: Views) -> tuple[Tensor, Branches]:
        """Set `.grad` to the gradient averaged over ranks; returns loss and branches."""
        parts = self.config.optim.accumulate
        if parts == 1:
            output = self._forward(self.parallel, views)
            self.scaler.scale(output.loss).backward()
            return output.loss.detach(), _detached([output.branches])
        split = list(zip(*(view.chunk(parts) for view in views), strict=True))
        if self.method.criterion.row_wise:
            outputs = []
            for i, part in enumerate(split):
                with self._no_sync(i < parts - 1):
                    output = self._forward(self.parallel, part)
                    self.scaler.scale(output.loss / parts).backward()
                    outputs.append(output)
            loss = torch.stack([output.loss.detach() for output in outputs]).mean()
            return loss, _detached([output.branches for output in outputs])
        return self._backward_through_whole_batch(split)

    def _backward_through_whole_batch(self, parts: list[Views]) -> tuple[Tensor, Branches]:
        """Two passes over the parts, with the criterion in between."""
        with torch.no_grad(), frozen_running_statistics(self.method):
            branches = _detached([self._forward(self.method, part).branches for part in parts])
        online = branches.online.requires_grad_()
        loss = self.method.loss(online, branches.target)
        self.scaler.scale(loss).backward()
        assert online.grad is not None
        gradients = online.grad.chunk(len(parts), dim=1)
        for i, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
            with self._no_sync(i < len(parts) - 1):
                self._forward(self.parallel, part, gradient).loss.backward()
        return loss.detach(), _detached([branches])

    def _no_sync(self, condition: bool) -> contextlib.AbstractContextManager[None]:
        if condition and isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    def noise(self, rows: int) -> Views:
        """Views of no image, always the same."""
        augment, generator = self.config.augment, torch.Generator().manual_seed(0)
        return tuple(
            torch.randn((rows, augment.channels, size, size), generator=generator).to(self.device)
            for size in augment.sizes
        )

    # ---- resuming exactly --------------------------------------------------------------------

    def warm_up_ddp_buckets(self) -> None:
        """Have DistributedDataParallel lay out its buckets for good.

        It rebuilds them after the first backward pass, so the first step of a process rounds
        differently from later ones, and a resumed run would differ from an undisturbed one. Two
        backward passes on noise bring every process to the final layout and leave no trace.
        """
        if not isinstance(self.parallel, DistributedDataParallel):
            return
        torch._foreach_copy_(self._kept, self._statistics)
        rows = self.config.optim.local_batch(world_size()) // self.config.optim.accumulate
        noise = self.noise(rows)
        for _ in range(2):
            self._forward(self.parallel, noise).loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_copy_(self._statistics, self._kept)


def _detached(parts: list[Branches]) -> Branches:
    """The rows of all parts, without gradient."""
    names = [field.name for field in fields(Branches) if getattr(parts[0], field.name) is not None]
    return Branches(
        **{name: torch.cat([getattr(part, name) for part in parts], dim=1).detach()
           for name in names}
    )  # fmt: skip
