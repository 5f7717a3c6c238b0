"""The loader for images that fit on the device: pixels stay there, views are made in batches.

Parameters are drawn on the host and travel in one table; both views of a batch are one call, and
so are all small ones. On a GPU nothing here waits for it.
"""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdm_fast.config import Config
from rdm_fast.data.images.sets import ImageSet, Pixels
from rdm_fast.data.loaders.batch import Batch, draw_all_views, labels_of, to_device
from rdm_fast.data.views.augment import view_table, views_of_table
from rdm_fast.data.views.sampler import ViewParameters, epoch_order, step_indices
from rdm_fast.runtime.precision import dtype_of_views


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
        self._dtype = dtype_of_views(config.precision, device)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        config = self.config
        order = epoch_order(config.seed, epoch, len(self.images))
        for step in range(start_step, self.steps_per_epoch):
            indices = step_indices(
                order, step, config.optim.global_batch, self.rank, self.world_size
            )
            drawn = draw_all_views(config, self.images, epoch, indices)
            view1, view2 = self._views(drawn[:2], indices, config.augment.size)
            small = self._views(drawn[2:], indices, config.augment.small_size)
            labels = to_device(labels_of(self.images, indices), self.device)
            yield Batch(view1, view2, labels, torch.from_numpy(indices), small)

    def _views(
        self, drawn: list[ViewParameters], indices: NDArray[np.int64], size: int
    ) -> tuple[Tensor, ...]:
        """Views of one size, each of all these images, [b, C, size, size]."""
        if not drawn:
            return ()
        table = to_device(view_table(drawn, indices), self.device)
        views = views_of_table(self._planes, table, self.config.augment, self._dtype, size)
        return views.chunk(len(drawn))
