"""Times the parts of a step, each alone, then the whole step.

    loader         batches from the loader, unused
    transfer       a GPU's input for one batch, copied from pinned memory
    decode         image files of a batch to pixels, in this process (torch loader)
    augmentation   views of a batch from decoded images: on the device (resident loader), or in
                   this process (torch loader)
    model          forward, backward and optimizer, without the spectral filter
    filter         the criterion alone, forward and backward, with its spectral filter
    end to end     loader and whole step, as in training

Several workers deliver batches in bursts, so a time is the total over the number of batches. The
model has random weights and is discarded. Nothing is written but the index of an image folder, as
in training.
"""

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rdm_fast.config import Config
from rdm_fast.data import Batch, ImageSet, Loader
from rdm_fast.data.images.bad_files import read_or_next
from rdm_fast.data.loaders.batch import draw_all_views
from rdm_fast.data.loaders.dali_loader import finished
from rdm_fast.data.views.augment import view_of_image, view_table, views_of_table
from rdm_fast.data.views.sampler import ViewParameters
from rdm_fast.filters.loss import NegativeCosine
from rdm_fast.methods import Method, build_method
from rdm_fast.runtime.cudnn import choose_algorithms
from rdm_fast.runtime.precision import dtype_of_views
from rdm_fast.training import cuda_graph as graph
from rdm_fast.training.train_step import TrainStep

LIMIT_S = 15.0  # for the measured batches of one stage; a batch under way is finished
WARM_UP = 2
SAMPLE = 16  # images of a batch that are decoded and augmented one by one


@dataclass(frozen=True)
class Stage:
    """The time of one part of a step."""

    name: str
    seconds: float | None
    """For a whole batch; None if this part does not exist by itself."""
    images_per_s: float | None
    batches: int
    """Number measured, after warming up."""
    note: str = ""


def absent(name: str, why: str) -> Stage:
    return Stage(name, None, None, 0, why)


class StageTimer:
    """Times repeated calls on a device."""

    def __init__(self, device: torch.device, batches: int) -> None:
        """batches: number of calls to measure; fewer if they take over LIMIT_S."""
        self.device, self.batches = device, batches

    def time(
        self,
        name: str,
        call: Callable[[], object],
        images: int,
        *,
        warm_up: int = WARM_UP,
        burst: int = 1,
        note: str = "",
    ) -> Stage:
        """Time calls that each make or use the same number of images.

        Args:
            images: of one call.
            warm_up: calls before the measured ones.
            burst: the number of measured calls is a multiple of this.
            note: remark for the reader.
        """
        for _ in range(warm_up):
            call()
        n, wanted = 0, -(-self.batches // burst) * burst
        start = self._now()
        while n < wanted and (n == 0 or n % burst or time.perf_counter() < start + LIMIT_S):
            call()
            n += 1
        seconds = (self._now() - start) / n
        return Stage(name, seconds, images / seconds, n, note)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def without_filter(config: Config) -> Method:
    """The method of a run without its spectral filter, if it has one."""
    method = build_method(config)
    if method.criterion.filter is not None:
        method.criterion = NegativeCosine()
    return method


class StepParts:
    """The parts of a step in one process, which takes the whole global batch."""

    def __init__(
        self,
        config: Config,
        images: ImageSet,
        loader: Loader,
        device: torch.device,
        *,
        batches: int,
    ) -> None:
        """
        Args:
            config: the run.
            images: its data.
            loader: its loader, on `device`.
            device: where the step runs.
            batches: largest number of batches to measure in each stage.
        """
        self.config, self.images, self.loader, self.device = config, images, loader, device
        self.rows = config.optim.global_batch
        self.timer = StageTimer(device, batches)

    def stages(self) -> Iterator[Stage]:
        """Every stage in the order listed above, each as soon as it is measured.

        Raises:
            UserError: the data cannot be read.
        """
        torch.manual_seed(self.config.seed)
        choose_algorithms(deterministic=self.config.step.deterministic)
        yield self.loading()
        yield self.transfer()
        yield self.decoding()
        yield self.augmentation()
        yield self.model()
        yield from self.filter_and_whole()

    # ---- data --------------------------------------------------------------------------------

    @property
    def burst(self) -> int:
        """Batches that arrive together: one from each worker process."""
        return max(1, self.config.data.workers) if self.loader.name == "torch" else 1

    def batches(self) -> Generator[Batch]:
        for epoch in itertools.count():
            yield from self.loader.epoch(epoch)

    @cached_property
    def batch(self) -> Batch:
        """One batch, for the stages that need only one."""
        with closing(self.batches()) as batches:
            return next(batches)

    @cached_property
    def drawn(self) -> list[ViewParameters]:
        """Parameters of all views of the first images."""
        return draw_all_views(self.config, self.images, 0, np.arange(self.rows))

    def from_loader(
        self, name: str, use: Callable[[Batch], object], warm_up: int = WARM_UP, note: str = ""
    ) -> Stage:
        """A stage that takes a new batch from the loader in each call."""
        with closing(self.batches()) as batches:
            return self.timer.time(
                name, lambda: use(next(batches)), self.rows, warm_up=max(warm_up, self.burst),
                burst=self.burst, note=note,
            )  # fmt: skip

    def loading(self) -> Stage:
        return self.from_loader("loader", lambda batch: batch, note=self.loader.name)

    def transfer(self) -> Stage:
        if self.device.type != "cuda":
            return absent("transfer", "none on a CPU")
        if self.loader.name == "dali":
            return absent("transfer", "inside DALI")
        augment = self.config.augment
        if self.loader.name == "torch":
            pixels = self.rows * sum(size**2 for size in augment.sizes)
            sent = torch.zeros(pixels, augment.channels, dtype=torch.uint8)
        else:  # parameters of the views; the pixels are there
            sent = view_table(self.drawn, np.arange(self.rows))
        sent = sent.pin_memory()
        megabytes = sent.numel() * sent.element_size() / 2**20
        return self.timer.time(
            "transfer",
            lambda: sent.to(self.device, non_blocking=True),
            self.rows,
            note=f"{megabytes:.2g} MiB per batch",
        )

    def decoding(self) -> Stage:
        if self.loader.name != "torch" or self.images.pixels is not None:
            return absent("decode", "inside DALI" if self.loader.name == "dali" else "done before")
        n = min(SAMPLE, self.rows)
        return self._alone("decode", n, lambda i: read_or_next(self.images, i, self.config.data))

    def augmentation(self) -> Stage:
        augment, device = self.config.augment, self.device
        dtype = dtype_of_views(self.config.precision, device)
        views = [(self.drawn[:2], augment.size), (self.drawn[2:], augment.small_size)]
        views = [(drawn, size) for drawn, size in views if drawn]
        if self.loader.name == "dali":
            shapes = [(self.rows, size, size, augment.channels) for _, size in views]
            crops = [torch.randint(256, shape, dtype=torch.uint8).to(device) for shape in shapes]

            def after_dali() -> None:
                for x, (drawn, size) in zip(crops, views, strict=True):
                    finished([x] * len(drawn), drawn, augment, size, dtype)

            stage = self.timer.time("augmentation", after_dali, self.rows)
            return replace(stage, note="colors; crops are made in DALI")
        if self.loader.name == "resident":
            assert self.images.pixels is not None
            planes = self.images.pixels[: self.rows].transpose(0, 3, 1, 2)
            pixels = torch.from_numpy(np.ascontiguousarray(planes)).to(device)
            calls = [
                (view_table(drawn, np.arange(self.rows)).to(device), size) for drawn, size in views
            ]

            def all_views() -> None:
                for table, size in calls:
                    views_of_table(pixels, table, augment, dtype, size)

            return self.timer.time("augmentation", all_views, self.rows)
        n = min(SAMPLE, self.rows)
        read = [read_or_next(self.images, i, self.config.data)[1] for i in range(n)]

        def all_views_of(i: int) -> None:
            for parameters, size in zip(self.drawn, augment.sizes, strict=True):
                view_of_image(read[i], parameters, i, augment, size)

        return self._alone("augmentation", n, all_views_of)

    def _alone(self, name: str, n: int, make: Callable[[int], object]) -> Stage:
        """A stage of the torch loader, timed image by image in this process."""

        def sample() -> None:
            for i in range(n):
                make(i)

        stage = self.timer.time(name, sample, n, warm_up=1)
        assert stage.seconds is not None
        note = f"in one process; the loader has {self.config.data.workers}"
        return replace(stage, seconds=stage.seconds * self.rows / n, note=note)

    # ---- step --------------------------------------------------------------------------------

    def _step(self, method: Method) -> TrainStep:
        return TrainStep(method, self.config, self.device, self.loader.steps_per_epoch)

    @property
    def step_warm_up(self) -> int:
        """Untimed steps; on a GPU they include the one that records a CUDA graph."""
        return graph.WARM_UP + 1 if self.device.type == "cuda" else WARM_UP

    def model(self) -> Stage:
        step = self._step(without_filter(self.config))
        return self.timer.time(
            "model", lambda: step(self.batch, 0), self.rows, warm_up=self.step_warm_up
        )

    def filter_and_whole(self) -> Iterator[Stage]:
        """The filter on projections of the run's model, then loader and step together."""
        step = self._step(build_method(self.config))
        branches = step(self.batch, 0).branches
        yield self.filter(step.method, branches.online, branches.target)
        stage = self.from_loader("end to end", lambda batch: step(batch, 0), self.step_warm_up)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            stage = replace(stage, note=f"at most {peak:.1f} GiB of GPU memory")
        yield stage

    def filter(self, method: Method, online: Tensor, target: Tensor) -> Stage:
        if method.criterion.filter is None:
            return absent("filter", f"predictor={self.config.predictor} has none")
        online = online.detach().requires_grad_()

        def both_ways() -> None:
            torch.autograd.grad(method.loss(online, target), online)

        return self.timer.time("filter", both_ways, self.rows)
