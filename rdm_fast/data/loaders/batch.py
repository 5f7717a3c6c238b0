"""What a loader gives to the trainer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdm_fast.config import Config
from rdm_fast.data.images.sets import ImageSet
from rdm_fast.data.views.sampler import ViewParameters, draw_views


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


class Loader(Protocol):
    """Batches of an epoch. Which they are depends on nothing but configuration and images."""

    name: ClassVar[str]
    steps_per_epoch: int

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from `start_step` on; a last partial one is dropped."""
        ...


def draw_all_views(
    config: Config, images: ImageSet, epoch: int, indices: NDArray[np.int64]
) -> list[ViewParameters]:
    """The parameters of some images' views, in the order of `AugmentConfig.views`."""
    heights, widths = images.sizes[indices].T
    return [
        draw_views(view, config.seed, epoch, indices, number, heights, widths)
        for number, view in enumerate(config.augment.views)
    ]


def labels_of(images: ImageSet, indices: NDArray[np.int64]) -> Tensor:
    """int64 [b]; -1 for an image without a label."""
    if images.labels is None:
        return torch.full((len(indices),), -1)
    return torch.from_numpy(images.labels[indices])


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that nothing waits for, from memory that the device can read by itself."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
