"""The loader for images that fit on the device: pixels stay there, views are made in batches.

Parameters are drawn on the host and travel in one table; both views of a batch are one call, and
so are all small ones. On a GPU nothing here waits for it.
"""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rdm_fast.config import Config
from rdm_fast.data.images.sets import ImageSet
from rdm_fast.data.loaders.batch import Batch, Indices, Loader, draw_all_views, to_device
from rdm_fast.data.views.augment import view_table, views_of_table
from rdm_fast.data.views.sampler import ViewParameters
from rdm_fast.runtime.precision import dtype_of_views


class ResidentLoader(Loader):
    """Decoded images of one size, augmented on the device as tensors."""

    name: ClassVar[str] = "resident"

    def __init__(
        self, config: Config, images: ImageSet, *, rank: int, world_size: int, device: torch.device
    ) -> None:
        """`images.pixels` must be set."""
        super().__init__(config, images, rank=rank, world_size=world_size, device=device)
        assert images.pixels is not None
        planes = np.ascontiguousarray(images.pixels.transpose(0, 3, 1, 2))  # resizing reads planes
        self._planes = torch.from_numpy(planes).to(device)
        self._dtype = dtype_of_views(config.precision, device)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        augment = self.config.augment
        for indices in self._steps(epoch, start_step):
            drawn = draw_all_views(self.config, self.images, epoch, indices)
            large = self._views(drawn[:2], indices, augment.size)
            small = self._views(drawn[2:], indices, augment.small_size)
            yield self._batch(large + small, indices)

    def _views(
        self, drawn: list[ViewParameters], indices: Indices, size: int
    ) -> tuple[Tensor, ...]:
        """Views of one size, each of all these images, [b, C, size, size]."""
        if not drawn:
            return ()
        table = to_device(view_table(drawn, indices), self.device)
        views = views_of_table(self._planes, table, self.config.augment, self._dtype, size)
        return views.chunk(len(drawn))
