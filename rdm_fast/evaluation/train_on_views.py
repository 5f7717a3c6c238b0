"""Training a probe, or the whole network, on a new random view of each image in every epoch.

The published protocols crop and flip the training images of their probes, so each epoch embeds
every image again. As everywhere in this package, a view depends only on (seed, epoch, index). With
several ranks, each trains on its share of a batch and gradients are averaged.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rdm_fast.config import Config, ViewConfig
from rdm_fast.data import ImageSet
from rdm_fast.data.images.bad_files import read_or_next
from rdm_fast.data.loaders.workers import in_workers
from rdm_fast.data.views.augment import view_of_image, views_of_batch, views_of_levels
from rdm_fast.data.views.sampler import ViewParameters, draw_views, epoch_order, step_indices
from rdm_fast.errors import UsageError
from rdm_fast.evaluation.probe import LinearClassifier, build_optimizer, initial_weights
from rdm_fast.evaluation.protocols import Protocol
from rdm_fast.models.backbone import memory_format
from rdm_fast.models.batchnorm import synchronize
from rdm_fast.optim import layer_decay_groups
from rdm_fast.runtime.distributed import print0, rank, world_size
from rdm_fast.runtime.precision import autocast

VIEW = ViewConfig(crop_scale=(0.08, 1.0), flip=0.5)
"""torchvision's RandomResizedCrop and RandomHorizontalFlip with their defaults."""
LINES = 10
"""Number of epochs whose loss is printed."""


def train_on_views(
    backbone: nn.Module,
    images: ImageSet,
    config: Config,
    protocol: Protocol,
    *,
    classes: int,
    seed: int,
    device: torch.device,
    finetune: bool = False,
    view: ViewConfig = VIEW,
) -> LinearClassifier:
    """Train a linear classifier on random views, and with `finetune` the backbone too.

    Args:
        backbone: on the device, in evaluation mode. Unchanged without `finetune`.
        images: labeled images.
        config: size and normalization of the views, precision of the backbone, worker processes.
        protocol: with solver sgd or lars.
        classes: number of classes K.
        seed: of initial weights, order and views.
        device: where everything runs.
        finetune: train all weights; batch norms then use the batch (over all ranks).
        view: distribution of the views.

    Returns:
        The classifier, the same on every rank, for embeddings of the returned backbone (which is
        in evaluation mode again).

    Raises:
        UsageError: there are more ranks than images, or --layer-decay without layers.
    """
    if len(images) < world_size():
        raise UsageError(f"--nproc {world_size()} is more than the {len(images)} training images")
    augment = config.augment
    with torch.no_grad():
        blank = torch.zeros(1, augment.channels, augment.size, augment.size, device=device)
        d_emb = int(backbone(blank).shape[1])
    head = nn.Linear(d_emb, classes)
    weight, bias = initial_weights(d_emb, classes, protocol, torch.Generator().manual_seed(seed))
    head.load_state_dict({"weight": weight, "bias": bias})
    head.to(device)
    backbone.requires_grad_(finetune)
    model: nn.Module = head
    if finetune:
        model = nn.Sequential(backbone, head).to(memory_format=memory_format(backbone))
    if finetune and world_size() > 1:
        model = synchronize(model, device)
    parallel = model
    if world_size() > 1:
        devices = [device] if device.type == "cuda" else None
        parallel = DistributedDataParallel(model, device_ids=devices)
    groups: list[dict[str, Any]] = [{"params": list(head.parameters()), "lr_scale": 1.0}]
    if finetune:
        groups = layer_decay_groups(backbone, head, protocol.layer_decay)
    optimizer = build_optimizer(groups, protocol)
    batch = protocol.batch_for(len(images))
    batch = max(batch - batch % world_size(), world_size())  # the same share for every rank
    if finetune:
        model.train()
    for epoch in range(protocol.epochs):
        for group in optimizer.param_groups:
            group["lr"] = protocol.lr_at(epoch) * group["lr_scale"]
        total, steps = torch.zeros((), device=device), 0
        for views, labels in view_batches(
            images, config, view, seed, epoch, batch, device, drop_last=protocol.drop_last
        ):
            with autocast(config.precision, device):
                if finetune:
                    logits = parallel(views)
                else:
                    with torch.no_grad():
                        embedding = backbone(views)
            if not finetune:
                logits = parallel(embedding.float())
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total, steps = total + loss.detach(), steps + 1
        if (epoch + 1) % max(1, protocol.epochs // LINES) == 0:
            print0(f"epoch {epoch + 1} of {protocol.epochs}: loss {float(total / steps):.4f}")
    backbone.eval().requires_grad_(False)
    return LinearClassifier(head.weight.detach().float(), head.bias.detach().float())


def view_batches(
    images: ImageSet,
    config: Config,
    view: ViewConfig,
    seed: int,
    epoch: int,
    batch: int,
    device: torch.device,
    *,
    drop_last: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of every batch of an epoch.

    Args:
        images: labeled images.
        config: size, interpolation and normalization of a view, and worker processes.
        view: distribution of the views.
        seed, epoch: with an image's index they determine its view.
        batch: images over all ranks.
        device: where views and labels go.
        drop_last: leave out the images that fill no batch. Otherwise they are a smaller one, to
            which the epoch's first images are added until it divides over the ranks, as in
            torch's DistributedSampler.

    Yields:
        Views [b, C, S, S], channels_last, and labels [b] int64, on the device.
    """
    order = epoch_order(seed, epoch, len(images))
    parts = [
        step_indices(order, step, batch, rank(), world_size())
        for step in range(len(order) // batch)
    ]
    rest = order[len(order) - len(order) % batch :]
    if len(rest) and not drop_last:
        rest = np.concatenate([rest, order[: -len(rest) % world_size()]])
        parts.append(step_indices(rest, 0, len(rest), rank(), world_size()))
    assert images.labels is not None
    make = _MakeViews(images, config, view, seed, epoch)
    if images.pixels is not None:
        for part in parts:
            pixels = torch.from_numpy(images.pixels[part]).to(device)
            labels = torch.from_numpy(images.labels[part]).to(device)
            yield views_of_batch(pixels, make.draw(part), config.augment), labels
        return
    row = config.augment.size**2 * images.channels
    made = in_workers(
        make, parts, config.data.workers, device, row_bytes=row, limit=config.data.timeout
    )
    for levels, indices in made:
        labels = torch.from_numpy(images.labels[indices.numpy()])
        views = views_of_levels(levels, config.augment, device)
        yield views, labels.to(device, non_blocking=True)


@dataclass(frozen=True)
class _MakeViews:
    """Called in a worker: one view of each image, uint8 [b, S, S, C], and their indices.

    They are those asked for, but for images that cannot be read (`read_or_next`).
    """

    images: ImageSet
    config: Config
    view: ViewConfig
    seed: int
    epoch: int

    def draw(self, indices: NDArray[np.int64]) -> ViewParameters:
        heights, widths = self.images.sizes[indices].T
        return draw_views(self.view, self.seed, self.epoch, indices, 0, heights, widths)

    def __call__(self, indices: NDArray[np.int64]) -> tuple[Tensor, ...]:
        read = [read_or_next(self.images, i, self.config.data) for i in indices.tolist()]
        shown = np.array([i for i, _ in read])
        drawn, augment = self.draw(shown), self.config.augment
        views = [view_of_image(image, drawn, row, augment) for row, (_, image) in enumerate(read)]
        return torch.from_numpy(np.stack(views)), torch.from_numpy(shown)
