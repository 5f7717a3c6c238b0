"""The loader for images that are decoded when needed: torch's worker processes, image by image.

A worker makes whole batches, as uint8; the device normalizes. Nothing is drawn in a worker: its
results follow from the images' indices alone, so the number of workers changes nothing.
"""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rdm_fast.config import Config
from rdm_fast.data.images.bad_files import read_or_next
from rdm_fast.data.images.sets import ImageSet
from rdm_fast.data.loaders.batch import Batch, Indices, Loader, draw_all_views
from rdm_fast.data.loaders.workers import in_workers
from rdm_fast.data.views.augment import view_of_image, views_of_levels


class TorchLoader(Loader):
    """Views made by torchvision and Pillow in `data.workers` processes a rank."""

    name: ClassVar[str] = "torch"

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        config, steps = self.config, self._steps(epoch, start_step)
        make = ViewsOfImages(config, self.images, epoch)
        made = in_workers(
            make, steps, config.data.workers, self.device,
            row_bytes=sum(S * S * self.images.channels for S in config.augment.sizes),
            limit=config.data.timeout,
        )  # fmt: skip
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
