"""The loader for images that are decoded when needed: torch's worker processes, image by image.

A worker makes whole batches, as uint8; the device normalizes. Nothing is drawn in a worker: what
it does follows from the images' indices alone, so the number of workers changes nothing.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rdm_fast.config import Config
from rdm_fast.data.images.bad_files import LostImages, read_or_next
from rdm_fast.data.images.decode import Pixels
from rdm_fast.data.images.sets import ImageSet
from rdm_fast.data.loaders.batch import Batch, draw_all_views, labels_of
from rdm_fast.data.views.augment import normalize, view_of_image
from rdm_fast.data.views.sampler import ViewParameters, epoch_order, step_indices
from rdm_fast.errors import UserError

Indices = NDArray[np.int64]
Made = tuple[Tensor, ...] | UserError
"""A batch from a worker, or what went wrong there: an exception that crosses processes as a value
keeps its message, torch would bury it in a traceback."""


class TorchLoader:
    """Views made by torchvision and Pillow in `data.workers` processes a rank."""

    name: ClassVar[str] = "torch"

    def __init__(
        self, config: Config, images: ImageSet, *, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.config, self.images, self.device = config, images, device
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = len(images) // config.optim.global_batch
        self._lost = LostImages(images, config.data)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        config, device = self.config, self.device
        order = epoch_order(config.seed, epoch, len(self.images))
        steps = [
            step_indices(order, step, config.optim.global_batch, self.rank, self.world_size)
            for step in range(start_step, self.steps_per_epoch)
        ]
        make = ViewsOfImages(config, self.images, epoch)
        made = in_workers(make, steps, config.data.workers, device)
        for asked, (labels, indices, *views) in zip(steps, made, strict=True):
            self._lost.note(asked, indices.numpy())
            view1, view2, *small = (to_device(view, config, device) for view in views)
            labels = labels.to(device, non_blocking=True)
            yield Batch(view1, view2, labels, indices, tuple(small))


class ViewsOfImages:
    """Makes labels, indices and all views of some images, these as uint8 [b, S, S, C].

    The indices are those asked for, but for images that cannot be read (`read_or_next`).
    """

    def __init__(self, config: Config, images: ImageSet, epoch: int) -> None:
        self.config, self.images, self.epoch = config, images, epoch

    def __call__(self, indices: Indices) -> tuple[Tensor, ...]:
        read = [read_or_next(self.images, i, self.config.data) for i in indices.tolist()]
        indices = np.array([i for i, _ in read])
        drawn = draw_all_views(self.config, self.images, self.epoch, indices)
        made = [self._views(drawn, row, image) for row, (_, image) in enumerate(read)]
        views = (torch.from_numpy(np.stack(view)) for view in zip(*made, strict=True))
        return labels_of(self.images, indices), torch.from_numpy(indices), *views

    def _views(self, drawn: list[ViewParameters], row: int, image: Pixels) -> list[Pixels]:
        augment = self.config.augment
        return [
            view_of_image(image, parameters, row, augment, size)
            for parameters, size in zip(drawn, augment.sizes, strict=True)
        ]


def to_device(view: Tensor, config: Config, device: torch.device) -> Tensor:
    """uint8 [b, S, S, C] to the normalized view, float32 [b, C, S, S] on the device."""
    return normalize(view.to(device, non_blocking=True).permute(0, 3, 1, 2), config.augment)


def in_workers(
    make: Callable[[Indices], tuple[Tensor, ...]],
    parts: list[Indices],
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, ...]]:
    """make(part) of each part in turn, computed ahead in worker processes (here if there are none).

    Raises:
        UserError: what `make` raised, without a worker's traceback.
    """
    loader: DataLoader[Made] = DataLoader(
        _Parts(make, parts),
        batch_size=None,
        num_workers=workers,
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
