"""The loader for images that are decoded when needed: torch's worker processes, image by image.

A worker makes whole batches, as uint8; the device normalizes. Nothing is drawn in a worker: its
results follow from the images' indices alone, so the number of workers changes nothing.
"""

import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rdm_fast.config import Config
from rdm_fast.data.images.bad_files import read_or_next
from rdm_fast.data.images.sets import ImageSet
from rdm_fast.data.loaders.batch import Batch, Indices, Loader, draw_all_views
from rdm_fast.data.views.augment import view_of_image, views_of_levels
from rdm_fast.errors import UserError

FIRST_CHOICE = "fork" if sys.platform == "linux" else "spawn"
"""How worker processes start, whatever the default of this version of Python."""
Made = tuple[Tensor, ...] | UserError
"""A batch from a worker, or its error: as a value it keeps its message, while torch would bury an
exception in a traceback."""


class TorchLoader(Loader):
    """Views made by torchvision and Pillow in `data.workers` processes a rank."""

    name: ClassVar[str] = "torch"

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        config, steps = self.config, self._steps(epoch, start_step)
        make = ViewsOfImages(config, self.images, epoch)
        made = in_workers(make, steps, config.data.workers, self.device)
        for asked, (indices, *levels) in zip(steps, made, strict=True):
            self._unreadable.note(asked, indices.numpy())
            views = [views_of_levels(view, config.augment, self.device) for view in levels]
            yield self._batch(views, indices.numpy())


class ViewsOfImages:
    """Makes all views of some images, uint8 [b, S, S, C] each, after their indices.

    The indices are those asked for, but for images that cannot be read (`read_or_next`).
    """

    def __init__(self, config: Config, images: ImageSet, epoch: int) -> None:
        self.config, self.images, self.epoch = config, images, epoch

    def __call__(self, indices: Indices) -> tuple[Tensor, ...]:
        read = [read_or_next(self.images, i, self.config.data) for i in indices.tolist()]
        shown, augment = np.array([i for i, _ in read]), self.config.augment
        drawn = draw_all_views(self.config, self.images, self.epoch, shown)
        made = (
            [view_of_image(image, p, row, augment, size) for row, (_, image) in enumerate(read)]
            for p, size in zip(drawn, augment.sizes, strict=True)
        )
        return torch.from_numpy(shown), *(torch.from_numpy(np.stack(views)) for views in made)


def in_workers(
    make: Callable[[Indices], tuple[Tensor, ...]],
    parts: list[Indices],
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, ...]]:
    """make(part) of each part in turn, computed ahead in worker processes (here if there are none).

    Raises:
        UserError: `make` raised it; without a worker's traceback.
    """
    # fork is quick and copies no million paths; a program that has chosen another way keeps it.
    start = multiprocessing.get_start_method(allow_none=True) or FIRST_CHOICE
    if workers:  # a forked worker that collects a DALI pipeline waits for threads that it lacks
        gc.collect()
    loader: DataLoader[Made] = DataLoader(
        _Parts(make, parts),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=multiprocessing.get_context(start) if workers else None,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else every epoch would draw from the global generator
    )
    for made in loader:
        if isinstance(made, UserError):
            raise made
        yield made


class _Parts(Dataset[Made]):
    def __init__(self, make: Callable[[Indices], tuple[Tensor, ...]], parts: list[Indices]) -> None:
        self.make, self.parts = make, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, part: int) -> Made:
        try:
            return self.make(self.parts[part])
        except UserError as error:
            return error
