"""The training loop and its state.

    for every epoch, for every batch of it:  step, log, evaluate, save

Order and augmentation of the images are functions of (seed, epoch, index, view), and schedules are
functions of the step. So an exact resume needs the step number, model, optimizer, and what
`Trainer.parts` count.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rdm_fast.config import Config
from rdm_fast.data import Batch, build_loader, load, require_same_images
from rdm_fast.errors import (
    Collapsed,
    Interrupted,
    OutputFailed,
    WorkersFailed,
)
from rdm_fast.evaluation.online_accuracy import OnlineAccuracy
from rdm_fast.evaluation.online_probe import OnlineProbe
from rdm_fast.methods import build_method
from rdm_fast.models.pretrained import file_note, warm_start
from rdm_fast.run import checkpoint
from rdm_fast.run.checkpoint import Snapshot
from rdm_fast.run.environment import describe_environment
from rdm_fast.run.folder import RunFolder
from rdm_fast.run.state import Stateful, flatten_optimizer, flatten_parts
from rdm_fast.runtime.cudnn import choose_algorithms
from rdm_fast.runtime.distributed import all_reduce_max, print0, rank, world_size
from rdm_fast.runtime.signals import StopOnSignal
from rdm_fast.spectrum import BranchSpectra
from rdm_fast.telemetry import Plan, StepTimer, Telemetry
from rdm_fast.training.collapse import CollapseGuard
from rdm_fast.training.restore import newest, restore
from rdm_fast.training.skipped import SkippedSteps
from rdm_fast.training.summary import summary
from rdm_fast.training.train_step import StepReport, TrainStep

MAX_FAILED_SAVES = 3


class Trainer:
    """One run, from its configuration to its last checkpoint.

    Attributes:
        step: optimizer steps done.
        before_step: called with each batch and the number of its step, from 0.
        after_step: called with the report of each step.
        parts: what a checkpoint holds besides model and optimizer, by name.

    Raises:
        UserError: the data, the run folder or the configuration cannot be used (its subclasses
            say which).
    """

    def __init__(self, config: Config, folder: RunFolder, device: torch.device) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.images = load(config.data, "train", folder.bad_files)
        require_same_images(self.images, config.data, device)
        self.loader = build_loader(
            config, self.images, rank=rank(), world_size=world_size(), device=device
        )
        torch.manual_seed(config.seed)
        choose_algorithms(deterministic=config.step.deterministic)
        self.train_step = TrainStep(
            build_method(config), config, device, self.loader.steps_per_epoch
        )
        self.selector = self.train_step.selector
        self.collapse_guard = CollapseGuard(config, self.train_step.total_steps)
        self.probe = OnlineProbe(config, self.images, self.train_step.method.backbone, device)
        self.accuracy = OnlineAccuracy(config, self.images, device, folder.bad_test_files)
        self.skipped = SkippedSteps(config, self.train_step.scaler)
        self.parts: dict[str, Stateful] = {
            "scaler": self.train_step.scaler,
            "skipped": self.skipped,
            "collapse_guard": self.collapse_guard,
            "probe": self.probe,
        }
        if self.selector:
            self.parts["filter_engine"] = self.selector
        self.step = 0
        self.before_step: list[Callable[[Batch, int], object]] = []
        self.after_step: list[Callable[[StepReport], object]] = []
        self._failed_saves = 0
        self._stop_asked = False
        self._lost: WorkersFailed | None = None
        self._last_saved = -1

    # ---- the loop ----------------------------------------------------------------------------

    def fit(self) -> None:
        """Train from the newest checkpoint, if there is one, to the end.

        Raises:
            Interrupted: a signal stopped the run; the state is saved.
            NonFinite: log.max_nonfinite steps in a row could not be applied.
            Collapsed: the projections collapsed, and guard.mode=stop; the state is saved.
            OutputFailed: three checkpoints in a row could not be written, or the last one.
            WorkersFailed: images could not be loaded any more; what is trained is saved.
        """
        self.train_step.warm_up_ddp_buckets()
        self.restore()
        if rank() == 0:
            path = f"step-{self.step:08d}" if self.step else ""
            self.folder.write_status("running", step=self.step, checkpoint=path)
        with StopOnSignal(self.ask_to_stop), self._telemetry() as telemetry, self._saving():
            lines = summary(
                self.config, self.images, self.loader.name, self._engine(), self.train_step,
                ranks=world_size(), step=self.step,
            )  # fmt: skip
            print0(*lines)
            if self.step == 0 and self.config.log.knn_every:
                self._evaluate(telemetry)  # of random weights, to compare with
            timer = StepTimer()
            for epoch in range(self.step // self.loader.steps_per_epoch, self.config.optim.epochs):
                start = self.step % self.loader.steps_per_epoch
                for batch in timer.waits(self._batches(epoch, start)):
                    for before in self.before_step:
                        before(batch, self.step)
                    report = self.train_step(
                        batch, self.step, lost=self._lost is not None, stop=self._stop_asked
                    )
                    for after in self.after_step:
                        after(report)
                    self.step += 1
                    self.skipped.watch(report)
                    if self._is_read_at_once:
                        self.skipped.read()
                    self.probe.update(batch.labels, report.lr, report.skipped)
                    self._log(report, telemetry, timer)
                    if self._epoch_is_due(self.config.log.knn_every):
                        self._evaluate(telemetry)
                        timer.restart()
                    stop = self._must_stop()
                    if stop or self._is_due(self.config.log.save_every):
                        self.save(last=stop or self._is_last)
                        timer.restart()
                    if stop:
                        raise self._interrupted()

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The loader's batches; on a rank of several that can load no more, noise in their place.

        The other ranks know nothing of it before the step, and would wait for this one.
        """
        try:
            yield from self.loader.epoch(epoch, start)
        except WorkersFailed as error:
            if world_size() == 1:
                raise
            self._lost = error
        while self._lost and self.step < (epoch + 1) * self.loader.steps_per_epoch:
            rows = self.config.optim.local_batch(world_size())
            large1, large2, *small = self.train_step.noise(rows)
            unknown = torch.full((rows,), -1, device=self.device)
            yield Batch(large1, large2, unknown, unknown.cpu(), tuple(small))

    @property
    def _is_read_at_once(self) -> bool:
        """Whether something of this step is logged, measured or saved, so its result must be known.

        This is the only regular wait for the device.
        """
        log = self.config.log
        due = map(self._is_due, (log.every, log.spectrum_every, log.save_every))
        return self._is_last or self._epoch_is_due(log.knn_every) or any(due)

    @property
    def _is_last(self) -> bool:
        return self.step == self.train_step.total_steps

    def _is_due(self, every: int) -> bool:
        """Whether `every` steps have passed, or all; 0 stands for never."""
        return bool(every) and (self.step % every == 0 or self._is_last)

    def _epoch_is_due(self, every: int) -> bool:
        """The same of `every` epochs."""
        return self._is_due(every * self.loader.steps_per_epoch)

    # ---- telemetry ---------------------------------------------------------------------------

    def _telemetry(self) -> Telemetry:
        plan = Plan(
            total_steps=self.train_step.total_steps, steps_per_epoch=self.loader.steps_per_epoch,
            global_batch=self.config.optim.global_batch, resumed_step=self.step,
        )  # fmt: skip
        environment = describe_environment(
            self.config, device=self.device, world_size=world_size(), loader=self.loader.name,
            engine=self._engine(),
        )  # fmt: skip
        return Telemetry.open(self.folder, self.config, environment, plan)

    def _engine(self) -> str:
        return self.selector.current(self.device) if self.selector else "none"

    def _log(self, report: StepReport, telemetry: Telemetry, timer: StepTimer) -> None:
        """Log the last step if it is due."""
        log = self._is_due(self.config.log.every)
        profile = self._is_due(self.config.log.spectrum_every)
        if not (log or profile):
            return
        spectra = self.train_step.method.spectra(report.branches, profile=profile)
        if profile:
            telemetry.log_spectra(self.step, spectra.record())
        if log:
            metrics = self._metrics(report, spectra, timer)
            telemetry.log(self.step, metrics)
            self._handle_collapse(self.collapse_guard.check(self.step, metrics), telemetry)

    def _handle_collapse(self, collapse: str | None, telemetry: Telemetry) -> None:
        """Log the guard's warning; with guard.mode=stop, end the run on every rank."""
        if collapse:
            telemetry.log(self.step, {"warning": collapse})
        if self.collapse_guard.stops and all_reduce_max(int(bool(collapse)), self.device):
            self.save(last=True)
            raise Collapsed(
                f"{collapse or 'the projections have collapsed'}; the state is saved, and with "
                "--guard warn the same command continues"
            )

    def _metrics(
        self, report: StepReport, spectra: BranchSpectra, timer: StepTimer
    ) -> dict[str, float | int]:
        loss = report.loss.clone()
        if world_size() > 1:
            dist.all_reduce(loss)
            loss /= world_size()
        metrics: dict[str, float | int] = {
            "epoch": self.step / self.loader.steps_per_epoch,
            "loss": float(loss),
            "lr": report.lr,
            "grad_norm": float(report.grad_norm),
            "skipped_steps": self.skipped.total,
            **spectra.metrics(),
            **timer.read(self.config.optim.global_batch),
        }
        if self.selector:
            metrics["filter_failures"] = self.selector.failures
        if self.config.has_target:
            metrics["ema_momentum"] = report.ema_momentum
        if self.device.type == "cuda":
            metrics["gpu_mem_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return metrics

    def _evaluate(self, telemetry: Telemetry) -> None:
        """Log kNN on each branch's embeddings, if there are labeled test images."""
        encoders = self.train_step.method.encoders
        with self.train_step.uncompiled():
            found = self.accuracy.measure(encoders, self.probe.classifier)
        if found:
            telemetry.log(self.step, found)

    # ---- checkpoints -------------------------------------------------------------------------

    def save(self, *, last: bool) -> None:
        """Write a checkpoint (rank zero). A failure is a warning, unless it is the last or third.

        Args:
            last: no other save follows.

        Raises:
            OutputFailed: the last save failed, or three in a row.
        """
        failed = all_reduce_max(self._save_here(), self.device)
        if failed >= (1 if last else MAX_FAILED_SAVES):
            what = f"{failed} checkpoints in a row" if failed > 1 else "the last checkpoint"
            raise OutputFailed(
                f"{what}, up to step {self.step}, could not be written to "
                f"{self.folder.checkpoints}: make room there and run the same command again"
            )

    def _save_here(self) -> int:
        """Write a checkpoint on rank zero; returns the number of failures in a row."""
        self.skipped.read()
        if rank() == 0 and self._last_saved != self.step:
            try:
                if self.folder.restore(self.config):
                    print0(
                        f"warning: {self.folder.path} was deleted while its run goes on: it is "
                        "made again, without what was in it"
                    )
                keep, note = self.config.log.keep, file_note(self.config)
                path = checkpoint.save(self.folder.checkpoints, self.snapshot(), keep, note)
                self._last_saved, self._failed_saves = self.step, 0
                self.folder.write_status("running", step=self.step, checkpoint=path.name)
            except OSError as error:
                self._failed_saves += 1
                print0(f"warning: no checkpoint at step {self.step}: {error}")
        return self._failed_saves

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Save what is trained if no more images can be loaded, which every rank knows."""
        try:
            yield
        except WorkersFailed as error:
            if (last := self.skipped.newest) and last.lost:
                self.step = last.number  # nothing was trained in this step
            self.save(last=True)
            if self._must_stop():
                raise self._interrupted() from error
            raise self._lost or error from None

    def snapshot(self) -> Snapshot:
        """Everything that the next step depends on."""
        method, optimizer = self.train_step.method, self.train_step.optimizer
        optim, plain = flatten_optimizer(optimizer, method.named_parameters())
        extra, state = flatten_parts(self.parts)
        return Snapshot(
            step=self.step,
            model=dict(method.state_dict()),
            optim=optim,
            extra={"torch_rng": torch.get_rng_state(), **extra},
            state={"optimizer": plain, "data": self.images.digest, **state},
        )

    def restore(self) -> None:
        """Load the newest sound checkpoint of the run folder, if there is one."""
        path = newest(self.folder, self.device)
        if path is None:
            warm_start(self.train_step.method, self.config)
            return
        self.step = self._last_saved = restore(
            path, self.train_step, self.parts, self.images, self.config
        )

    # ---- signals -----------------------------------------------------------------------------

    def ask_to_stop(self) -> None:
        """Save and stop after the current step."""
        self._stop_asked = True

    def _must_stop(self) -> bool:
        """Whether any rank got a signal, which all learn with the last step that was read."""
        last = self.skipped.newest
        asked = self._stop_asked if world_size() == 1 else last is not None and last.stop
        return asked and not self._is_last

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"stopped by a signal after step {self.step} of {self.train_step.total_steps}, saved "
            f"in {self.folder.path}: run the same command again to continue"
        )
