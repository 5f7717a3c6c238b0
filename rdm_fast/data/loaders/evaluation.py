"""Images for evaluation: every image once over all ranks, without augmentation."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rdm_fast.config import AugmentConfig
from rdm_fast.data.images.bad_files import UnreadableImages
from rdm_fast.data.images.sets import ImageSet, Pixels, require_channels
from rdm_fast.data.loaders.batch import Indices
from rdm_fast.data.loaders.workers import in_workers
from rdm_fast.data.views.augment import views_of_levels
from rdm_fast.errors import DataError

MARGIN = (256, 224)
"""The usual evaluation shows the middle 224 of 256 pixels."""
NO_MARGIN_BELOW = 64


def evaluation_batches(
    images: ImageSet,
    augment: AugmentConfig,
    *,
    batch: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    limit: float = 600.0,
    unreadable: UnreadableImages | None = None,
    whole: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once over all ranks, without augmentation.

    Rank r has images r, r + world_size, ...; the last batch of a rank may be smaller.
    With `whole`, batches do not depend on the ranks: rank r has batches r, r + world_size, ... of
    the images in their order, and the last one has at least two images.

    Args:
        images: the data set.
        augment: side, interpolation and normalization.
        batch: images of a rank at a time.
        device: where they go.
        workers: processes that decode; decoded images need none.
        limit: seconds that they may take for a batch.
        unreadable: gets the images that cannot be read, which are left out; None to refuse them.

    Yields:
        Images, float32 [b, C, S, S], channels_last, on the device; and their indices, int64 [b],
        on the CPU.

    Raises:
        UsageError: the number of channels differs.
        DataError: an image cannot be read, and `unreadable` does not allow that.
        WorkersFailed: a worker was lost or hangs.
    """
    require_channels(images, augment, "the data set")
    every = np.arange(len(images))
    if whole:
        parts = np.split(every, range(batch, len(every) - 1, batch))[rank::world_size]
    else:
        own = every[rank::world_size]
        parts = [own[start : start + batch] for start in range(0, len(own), batch)]
    make = _CenterViews(images, augment, skip=unreadable is not None)
    row = augment.size**2 * images.channels
    made = in_workers(make, parts, workers, device, row_bytes=row, limit=limit)
    for asked, (levels, indices) in zip(parts, made, strict=True):
        if unreadable is not None:
            for i in np.setdiff1d(asked, indices.numpy()).tolist():
                unreadable.add(i)
        if len(indices):
            yield views_of_levels(levels, augment, device), indices


class _CenterViews:
    """Makes the views of some images, uint8 [b, S, S, C], with their indices.

    With `skip`, images that cannot be read are left out.
    """

    def __init__(self, images: ImageSet, augment: AugmentConfig, skip: bool) -> None:
        self.images, self.augment, self.skip = images, augment, skip

    def __call__(self, indices: Indices) -> tuple[Tensor, ...]:
        images, S = self.images, self.augment.size
        if images.pixels is not None and images.pixels.shape[1:3] == (S, S):
            return torch.from_numpy(images.pixels[indices]), torch.from_numpy(indices)
        views: list[Pixels] = []
        shown: list[int] = []
        for i in indices.tolist():
            with contextlib.suppress(*([DataError] if self.skip else [])):
                views.append(center_view(images.read(i), self.augment))
                shown.append(i)
        pixels = np.stack(views) if views else np.empty((0, S, S, images.channels), np.uint8)
        return torch.from_numpy(pixels), torch.tensor(shown, dtype=torch.int64)


def shorter_side(size: int) -> int:
    """Pixels to which the shorter side of an image is resized, for views of this size."""
    return round(size * MARGIN[0] / MARGIN[1]) if size >= NO_MARGIN_BELOW else size


def center_view(image: Pixels, augment: AugmentConfig) -> Pixels:
    """An image as evaluation shows it: resized (antialiased), and cropped to its middle.

    The shorter side becomes 256 / 224 of the view (the view itself under 64 pixels); sides and
    corner are rounded as torchvision's Resize and CenterCrop do.

    Args:
        image: [H, W, C].
        augment: side S and interpolation.

    Returns:
        [S, S, C]; an image of this size is returned as it is.
    """
    S = augment.size
    H, W, C = image.shape
    if (H, W) == (S, S):
        return image
    short = shorter_side(S)
    height, width = (short, int(short * W / H)) if H <= W else (int(short * H / W), short)
    whole = Image.fromarray(image[:, :, 0] if C == 1 else image)
    resized = whole.resize((width, height), Image.Resampling[augment.interpolation.upper()])
    top, left = round((height - S) / 2), round((width - S) / 2)
    return np.asarray(resized.crop((left, top, left + S, top + S))).reshape(S, S, C)
