"""A probe, or the whole network, trained on views that are drawn anew in every epoch.

The published protocols crop and flip the training images of their probes: each epoch embeds every
image again, from another crop. As everywhere here, who is seen how is a function of (seed, epoch,
index). With several ranks each trains on its share of a batch, and gradients are averaged.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rdm_fast.config import AugmentConfig, Config, ViewConfig
from rdm_fast.data import ImageSet
from rdm_fast.data.loaders.torch_loader import in_workers
from rdm_fast.data.views.augment import normalize, view_of_image, views_of_batch
from rdm_fast.data.views.sampler import ViewParameters, draw_views, epoch_order, step_indices
from rdm_fast.evaluation.probe import LinearClassifier, initial_weights
from rdm_fast.evaluation.protocols import Protocol
from rdm_fast.models.batchnorm import synchronize
from rdm_fast.optim import Lars
from rdm_fast.runtime.distributed import print0, rank, world_size
from rdm_fast.runtime.precision import autocast

VIEW = ViewConfig(crop_scale=(0.08, 1.0), flip=0.5)
"""torchvision's RandomResizedCrop and RandomHorizontalFlip with their defaults."""
LINES = 10
"""Epochs are reported that often, all in all."""


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
    """Train a linear classifier on random views, and with `finetune` the backbone under it.

    Args:
        backbone: on the device, in evaluation mode. Frozen and left as it is, or trained.
        images: every one with a label.
        config: side and normalization of the views, precision of the backbone, worker processes.
        protocol: solver sgd or lars.
        classes: number of classes K.
        seed: of initial weights, order and views.
        device: where everything runs.
        finetune: train all weights; batch norms then use the batch (over all ranks).
        view: how a view is drawn.

    Returns:
        The classifier, the same on every rank, for embeddings of the backbone as it is afterwards
        (in evaluation mode again).
    """
    d_emb = _width(backbone, config.augment, device)
    head = nn.Linear(d_emb, classes)
    weight, bias = initial_weights(d_emb, classes, protocol, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    head.to(device)
    backbone.requires_grad_(finetune)
    model: nn.Module = head
    if finetune:  # laid out as its views are
        model = nn.Sequential(backbone, head).to(memory_format=torch.channels_last)
    if finetune and world_size() > 1:
        model = synchronize(model, device)
    parallel = model
    if world_size() > 1:
        devices = [device] if device.type == "cuda" else None
        parallel = DistributedDataParallel(model, device_ids=devices)
    optimizer = _optimizer(model, protocol)
    batch = protocol.batch_for(len(images))
    batch = max(batch - batch % world_size(), world_size())  # the same share for every rank
    if finetune:
        model.train()
    for epoch in range(protocol.epochs):
        for group in optimizer.param_groups:
            group["lr"] = protocol.lr_at(epoch)
        total, steps = torch.zeros((), device=device), 0
        for views, labels in view_batches(images, config, view, seed, epoch, batch, device):
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


def _width(backbone: nn.Module, augment: AugmentConfig, device: torch.device) -> int:
    blank = torch.zeros(1, augment.channels, augment.size, augment.size, device=device)
    with torch.no_grad():
        return int(backbone(blank).shape[1])


def _optimizer(model: nn.Module, protocol: Protocol) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if protocol.solver == "lars":
        return Lars(
            parameters,
            lr=protocol.lr,
            momentum=protocol.momentum,
            weight_decay=protocol.weight_decay,
            trust_coefficient=protocol.trust_coefficient,
            clip=False,
        )
    return torch.optim.SGD(
        parameters, protocol.lr, protocol.momentum, weight_decay=protocol.weight_decay
    )


def view_batches(
    images: ImageSet,
    config: Config,
    view: ViewConfig,
    seed: int,
    epoch: int,
    batch: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of every whole batch of an epoch.

    Args:
        images: to be shown; those that fill no batch are dropped.
        config: side, interpolation and normalization of a view, and worker processes.
        view: how a view is drawn.
        seed, epoch: decide, with an image's index, how it is shown.
        batch: images over all ranks.
        device: where they go.

    Yields:
        Views [b, C, S, S], channels_last, and labels [b] int64, on the device.
    """
    order = epoch_order(seed, epoch, len(images))
    parts = [
        step_indices(order, step, batch, rank(), world_size())
        for step in range(len(order) // batch)
    ]
    assert images.labels is not None
    make = _OneView(images, config.augment, view, seed, epoch)
    if images.pixels is not None:
        for part in parts:
            pixels = torch.from_numpy(images.pixels[part]).to(device)
            labels = torch.from_numpy(images.labels[part]).to(device)
            yield views_of_batch(pixels, make.draw(part), config.augment), labels
        return
    for levels, indices in in_workers(make, parts, config.data.workers, device):
        planes = levels.to(device, non_blocking=True).permute(0, 3, 1, 2)
        labels = torch.from_numpy(images.labels[indices.numpy()])
        yield normalize(planes, config.augment), labels.to(device, non_blocking=True)


class _OneView:
    """Makes one view of some images, as uint8 [b, S, S, C], and passes their indices on."""

    def __init__(
        self, images: ImageSet, augment: AugmentConfig, view: ViewConfig, seed: int, epoch: int
    ) -> None:
        self.images, self.augment, self.view = images, augment, view
        self.seed, self.epoch = seed, epoch

    def draw(self, indices: NDArray[np.int64]) -> ViewParameters:
        heights, widths = self.images.sizes[indices].T
        return draw_views(self.view, self.seed, self.epoch, indices, 0, heights, widths)

    def __call__(self, indices: NDArray[np.int64]) -> tuple[Tensor, ...]:
        drawn = self.draw(indices)
        views = [
            view_of_image(self.images.read(i), drawn, row, self.augment)
            for row, i in enumerate(indices.tolist())
        ]
        return torch.from_numpy(np.stack(views)), torch.from_numpy(indices)
