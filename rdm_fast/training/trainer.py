"""The loop and its state.

    for every epoch, for every batch of it:  step, log, evaluate, save

State is a step number, the method's tensors and the optimizer's. Who sees which image how is a
function of (seed, epoch, index, view), and the schedules of the step, so nothing else is needed
to go on from a checkpoint exactly where it was left.
"""

from functools import cached_property

import torch
import torch.distributed as dist

from rdm_fast.config import Config
from rdm_fast.data import ImageSet, build_loader, load, require_same_images
from rdm_fast.errors import Collapsed, DataError, InputMissing, Interrupted, OutputFailed
from rdm_fast.evaluation.online_probe import OnlineProbe, online_accuracies
from rdm_fast.filters.response import advice
from rdm_fast.methods import build_method
from rdm_fast.models.pretrained import load_strict, warm_start
from rdm_fast.run import checkpoint
from rdm_fast.run.checkpoint import Snapshot
from rdm_fast.run.environment import describe_environment
from rdm_fast.run.folder import RunFolder
from rdm_fast.runtime.distributed import all_reduce_max, print0, rank, world_size
from rdm_fast.runtime.signals import SIGNALS, StopOnSignal
from rdm_fast.spectrum import BranchSpectra, branch_spectra
from rdm_fast.telemetry import Clock, Plan, Telemetry
from rdm_fast.training import SkippedSteps, StepReport, TrainStep
from rdm_fast.training.collapse import CollapseGuard

__all__ = ["SIGNALS", "Trainer"]

MAX_FAILED_SAVES = 3


class Trainer:
    """One run, from its configuration to its last checkpoint.

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
        torch.backends.cudnn.deterministic = True
        self.train_step = TrainStep(
            build_method(config), config, device, self.loader.steps_per_epoch
        )
        self.selector = self.train_step.selector
        self.collapse_guard = CollapseGuard(config, self.train_step.total_steps)
        self.probe = OnlineProbe(config, self.images, self.train_step.method.backbone, device)
        self.step = 0
        """Optimizer steps done."""
        self.skipped = SkippedSteps(config, self.train_step.scaler)
        self._failed_saves = 0
        self._stop_asked = False
        self._last_saved = -1

    # ---- the loop ----------------------------------------------------------------------------

    def fit(self) -> None:
        """Train from where the run folder stands to the end.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
            NonFinite: log.max_nonfinite steps in a row could not be applied.
            Collapsed: the projections collapsed, and guard.mode=stop; the state is saved.
            OutputFailed: three checkpoints in a row could not be written, or the last one.
        """
        self.train_step.settle()
        self.restore()
        if rank() == 0:
            self.folder.write_status("running", step=self.step)
        with self._signals(), self._telemetry() as telemetry:
            self._announce()
            if self.step == 0 and self.config.log.knn_every:
                self._evaluate(telemetry)  # what random weights are worth
            clock = Clock()
            for epoch in range(self.step // self.loader.steps_per_epoch, self.config.optim.epochs):
                start = self.step % self.loader.steps_per_epoch
                for batch in clock.waits(self.loader.epoch(epoch, start)):
                    report = self.train_step(batch, self.step)
                    self.step += 1
                    self.skipped.watch(report)
                    self.probe.update(batch.labels, report.lr, report.skipped)
                    self._tell(report, telemetry, clock)
                    if self._epoch_is_due(self.config.log.knn_every):
                        self._evaluate(telemetry)
                        clock.restart()
                    stop = self._must_stop()
                    if stop or self._is_due(self.config.log.save_every):
                        self.save(last=stop or self.step == self.train_step.total_steps)
                        clock.restart()
                    if stop:
                        raise Interrupted(
                            f"stopped by a signal after step {self.step} of "
                            f"{self.train_step.total_steps}, saved in {self.folder.path}: "
                            "run the same command again to go on"
                        )

    def _is_due(self, every: int) -> bool:
        """Whether something is due that is done every so many steps and at the end; 0 is never."""
        is_last = self.step == self.train_step.total_steps
        return bool(every) and (self.step % every == 0 or is_last)

    def _epoch_is_due(self, every: int) -> bool:
        epochs, rest = divmod(self.step, self.loader.steps_per_epoch)
        ends = rest == 0 and (epochs % every == 0 if every else False)
        return ends or (bool(every) and self.step == self.train_step.total_steps)

    # ---- what is told ------------------------------------------------------------------------

    def _telemetry(self) -> Telemetry:
        plan = Plan(
            total_steps=self.train_step.total_steps,
            steps_per_epoch=self.loader.steps_per_epoch,
            global_batch=self.config.optim.global_batch,
            resumed_step=self.step,
        )
        environment = describe_environment(
            self.config,
            device=self.device,
            world_size=world_size(),
            loader=self.loader.name,
            engine=self._engine(),
        )
        return Telemetry.open(self.folder, self.config, environment, plan)

    def _engine(self) -> str:
        return self.selector.current(self.device) if self.selector else "none"

    def _announce(self) -> None:
        """Say once what `auto` stands for, and what RDM thinks of the filter."""
        config, parts = self.config, self.config.optim.accumulate
        print0(
            f"{config.method}, predictor {config.predictor}, on {len(self.images)} images of "
            f"{config.data.name}: {world_size()} rank(s) on {self.device.type}, global batch "
            f"{config.optim.global_batch}, {config.optim.local_batch(world_size())} a rank"
            + (f" in {parts} parts" if parts > 1 else "")
            + f", loader {self.loader.name}"
            + (f", filter engine {self._engine()}" if self.selector else "")
            + (", steps as a CUDA graph" if self.train_step.graph else "")
        )
        if self.selector and (text := advice(config.filter)):
            print0(f"warning: {text}")
        if self.step:
            print0(f"resumed from step {self.step}")

    def _tell(self, report: StepReport, telemetry: Telemetry, clock: Clock) -> None:
        """Log what is due of the last step; the only regular wait for the device."""
        log = self._is_due(self.config.log.every)
        profile = self._is_due(self.config.log.spectrum_every)
        if not (log or profile):
            return
        self.skipped.read()
        b, spectral = report.branches, self.train_step.method.criterion.filter
        spectra = branch_spectra(b.online, b.target, b.projection, spectral, profile=profile)
        if profile:
            telemetry.log_spectra(self.step, spectra.record())
        if log:
            metrics = self._metrics(report, spectra, clock)
            telemetry.log(self.step, metrics)
            self._heed(self.collapse_guard.look(self.step, metrics), telemetry)

    def _heed(self, collapse: str | None, telemetry: Telemetry) -> None:
        """Pass on what the guard has to say; end the run if that is asked for, on every rank."""
        if collapse:
            telemetry.log(self.step, {"warning": collapse})
        if self.collapse_guard.stops and all_reduce_max(int(bool(collapse)), self.device):
            self.save(last=True)
            raise Collapsed(
                f"{collapse or 'the projections have collapsed'}; the state is saved, and with "
                "--guard warn the same command goes on"
            )

    def _metrics(
        self, report: StepReport, spectra: BranchSpectra, clock: Clock
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
            **clock.read(self.config.optim.global_batch),
        }
        if self.selector:
            metrics["filter_failures"] = self.selector.failures
        if self.config.method == "byol":
            metrics["ema_momentum"] = report.ema_momentum
        if self.device.type == "cuda":
            metrics["gpu_mem_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return metrics

    def _evaluate(self, telemetry: Telemetry) -> None:
        """Log kNN on the backbone's embeddings, if there are labeled test images."""
        if self._test_images is None:
            return
        backbone = self.train_step.method.backbone
        sets = self.images, self._test_images
        with self.train_step.uncompiled():
            found = online_accuracies(
                backbone, *sets, self.config, self.device, self.probe.classifier
            )
        if found:
            telemetry.log(self.step, found)

    @cached_property
    def _test_images(self) -> ImageSet | None:
        try:
            return load(self.config.data, "test", self.folder.bad_test_files)
        except InputMissing as error:
            print0(f"no kNN while training: {error}")
            return None

    # ---- what is saved -----------------------------------------------------------------------

    def save(self, *, last: bool) -> None:
        """Write a checkpoint (rank zero). A failure is reported and tried again at the next one.

        Args:
            last: there is no next one.

        Raises:
            OutputFailed: it failed three times in a row, or was the last.
        """
        failed = 0
        self.skipped.read()
        if rank() == 0 and self._last_saved != self.step:
            try:
                path = checkpoint.save(
                    self.folder.checkpoints, self.snapshot(), self.config.log.keep
                )
                self._last_saved, self._failed_saves = self.step, 0
                self.folder.write_status("running", step=self.step, checkpoint=path.name)
            except OSError as error:
                self._failed_saves += 1
                failed = self._failed_saves
                print0(f"warning: no checkpoint at step {self.step}: {error}")
        failed = all_reduce_max(failed, self.device)
        if failed >= (1 if last else MAX_FAILED_SAVES):
            what = f"{failed} checkpoints in a row" if failed > 1 else "the last checkpoint"
            raise OutputFailed(
                f"{what}, up to step {self.step}, could not be written to "
                f"{self.folder.checkpoints}: make room there and run the same command again"
            )

    def snapshot(self) -> Snapshot:
        """Everything that the next step depends on."""
        method, optimizer = self.train_step.method, self.train_step.optimizer
        tensors, plain = checkpoint.flatten_optimizer(optimizer, method.named_parameters())
        return Snapshot(
            step=self.step,
            model=dict(method.state_dict()),
            optim=tensors,
            extra={"torch_rng": torch.get_rng_state(), **self.probe.state},
            state={
                "optimizer": plain,
                "scaler": self.train_step.scaler.state_dict(),
                "skipped": self.skipped.total,
                "skipped_in_a_row": self.skipped.in_a_row,
                "collapsed_in_a_row": self.collapse_guard.low,
                "filter_engine": self.selector.state_dict() if self.selector else {},
                "world_size": world_size(),
                "data": self.images.digest,
                "ema_momentum": self.train_step.momentum(self.step),
            },
        )

    def restore(self) -> None:
        """Take up the newest sound checkpoint of the run folder, if there is one."""
        path = checkpoint.newest(
            self.folder.checkpoints, lambda text: print0(f"warning: {text}"), sweep=rank() == 0
        )
        step = -1 if path is None else int(path.name.split("-")[1].split(".")[0])
        if all_reduce_max(step, self.device) != step:
            raise InputMissing(
                f"rank {rank()} does not see the checkpoints of the other ranks in "
                f"{self.folder.path}: --out must be a folder that all ranks share"
            )
        if path is None:
            if any(self.folder.checkpoints.glob("step-*")):
                raise DataError(
                    f"every checkpoint in {self.folder.checkpoints} is damaged: restore one, or "
                    "start anew with --overwrite"
                )
            warm_start(self.train_step.method, self.config.model, self.config.augment.channels)
            return
        snapshot = checkpoint.load(path)
        data = snapshot.state.get("data")
        self.images.require_digest(data, self.folder.path, self.config.data.root)
        method, optimizer = self.train_step.method, self.train_step.optimizer
        load_strict(method, snapshot.model, f"checkpoint {path}")
        checkpoint.restore_optimizer(
            optimizer, method.named_parameters(), snapshot.optim, snapshot.state["optimizer"]
        )
        self.train_step.scaler.load_state_dict(snapshot.state["scaler"])
        torch.set_rng_state(snapshot.extra["torch_rng"])
        self.probe.restore(snapshot.extra)
        self.step = self._last_saved = snapshot.step
        self.skipped.total = snapshot.state["skipped"]
        self.skipped.in_a_row = snapshot.state["skipped_in_a_row"]
        self.collapse_guard.low = snapshot.state.get("collapsed_in_a_row", 0)
        if self.selector:
            self.selector.load_state_dict(snapshot.state["filter_engine"])

    # ---- signals -----------------------------------------------------------------------------

    def _signals(self) -> StopOnSignal:
        return StopOnSignal(self.ask_to_stop)

    def ask_to_stop(self) -> None:
        """Stop after the step that is running, saving it."""
        self._stop_asked = True

    def _must_stop(self) -> bool:
        """Whether any rank was asked to stop; ranks ask each other only when they log."""
        if self.step == self.train_step.total_steps:
            return False
        if world_size() == 1:
            return self._stop_asked
        if not self._is_due(self.config.log.every):
            return False
        return bool(all_reduce_max(int(self._stop_asked), self.device))
