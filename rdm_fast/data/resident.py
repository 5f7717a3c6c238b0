"""The loader for images that fit on the device: pixels stay there, views are made in batches."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch

from rdm_fast.config import Config
from rdm_fast.data.augment import views_of_batch
from rdm_fast.data.batch import Batch, draw_pair, labels_of
from rdm_fast.data.images import ImageSet, Pixels
from rdm_fast.data.sampler import epoch_order, step_indices


class ResidentLoader:
    """Decoded images of one size, augmented on the device as tensors."""

    name: ClassVar[str] = "resident"

    def __init__(
        self,
        config: Config,
        images: ImageSet,
        pixels: Pixels,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        """`pixels` are those of `images`, [N, H, W, C]."""
        self.config, self.images, self.device = config, images, device
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = len(images) // config.optim.global_batch
        planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))  # resizing reads planes
        self._planes = torch.from_numpy(planes).to(device)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        config = self.config
        order = epoch_order(config.seed, epoch, len(self.images))
        for step in range(start_step, self.steps_per_epoch):
            indices = step_indices(
                order, step, config.optim.global_batch, self.rank, self.world_size
            )
            chosen = torch.from_numpy(indices)
            planes = self._planes[chosen.to(self.device, non_blocking=True)]
            pixels = planes.permute(0, 2, 3, 1)
            view1, view2 = (
                views_of_batch(pixels, parameters, config.augment)
                for parameters in draw_pair(config, self.images, epoch, indices)
            )
            labels = labels_of(self.images, indices).to(self.device, non_blocking=True)
            yield Batch(view1, view2, labels, chosen)
