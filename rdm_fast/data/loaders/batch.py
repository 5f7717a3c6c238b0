"""What all loaders share: batches, and which images of an epoch are in them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdm_fast.config import Config
from rdm_fast.data.images.bad_files import UnreadableImages
from rdm_fast.data.images.sets import ImageSet
from rdm_fast.data.views.sampler import ViewParameters, draw_views, epoch_order, step_indices

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's images of one step."""

    view1: Tensor
    """[b, C, S, S], normalized, channels_last, on the device; float32, or the 16-bit dtype to which
    the backbone's autocast would round it."""
    view2: Tensor
    """The second view of the same images."""
    labels: Tensor
    """int64 [b], on the device; -1 for an image without a label."""
    indices: Tensor
    """int64 [b], of the images in the data set, on the CPU."""
    small: tuple[Tensor, ...] = ()
    """Further views, [b, C, s, s] each, with a smaller side s."""

    @property
    def views(self) -> tuple[Tensor, ...]:
        return self.view1, self.view2, *self.small


class Loader(ABC):
    """Batches of an epoch, which depend on configuration and images only."""

    name: ClassVar[str]

    def __init__(
        self, config: Config, images: ImageSet, *, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.config, self.images, self.device = config, images, device
        self._rank, self._world_size = rank, world_size
        self.steps_per_epoch = len(images) // config.optim.global_batch
        self._unreadable = UnreadableImages(images, config.data)

    @abstractmethod
    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch from `start_step` on, without a last partial one."""

    def _steps(self, epoch: int, start: int) -> list[Indices]:
        """This rank's images of each step."""
        order = epoch_order(self.config.seed, epoch, len(self.images))
        batch = self.config.optim.global_batch
        return [
            step_indices(order, step, batch, self._rank, self._world_size)
            for step in range(start, self.steps_per_epoch)
        ]

    def _batch(self, views: Sequence[Tensor], indices: Indices) -> Batch:
        """A batch of these images from all their views, on the device."""
        labels = np.full(len(indices), -1)
        if self.images.labels is not None:
            labels = self.images.labels[indices]
        there = to_device(torch.from_numpy(labels), self.device)
        return Batch(views[0], views[1], there, torch.from_numpy(indices), tuple(views[2:]))


def draw_all_views(
    config: Config, images: ImageSet, epoch: int, indices: Indices
) -> list[ViewParameters]:
    """The parameters of some images' views, in the order of `AugmentConfig.views`."""
    heights, widths = images.sizes[indices].T
    return [
        draw_views(view, config.seed, epoch, indices, number, heights, widths)
        for number, view in enumerate(config.augment.views)
    ]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; the host does not wait."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
