"""The sgd-sweep protocol: every pair of learning rate and weight decay, trained in one pass.

All k probes see the same batches, so their weights form one tensor [k, K, d] and their logits are
one matrix product of a batch with k K rows. The gradient of the summed losses is each probe's own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_fast.evaluation.accuracy import check_labels
from rdm_fast.evaluation.probe import (
    LinearClassifier,
    choose_on_held_out,
    fit_iterated,
    fold,
    initial_weights,
    standardization,
)
from rdm_fast.evaluation.protocols import Protocol

Setting = tuple[float, float]
"""Learning rate of the first epoch, and weight decay."""


def fit_best_sgd(
    features: Tensor, labels: Tensor, *, classes: int, protocol: Protocol, seed: int
) -> tuple[LinearClassifier, Setting]:
    """Choose from protocol.lrs x protocol.weight_decays on a held-out tenth, then fit all images.

    Args:
        features: embeddings, [N, d]; the fit runs on their device.
        labels: [N] int64 class ids.
        classes: number of classes K.
        protocol: epochs, batch, schedule, momentum and candidates.
        seed: of the held-out tenth, the initial weights and the order of images.

    Returns:
        The classifier and the chosen setting: of equally good ones the one with the largest
        decay, then the smallest rate.

    Raises:
        ValueError: features and labels do not match, or there are fewer than 2 images.
    """
    check_labels(features, labels, classes, "training")
    decays, rates = sorted(protocol.weight_decays, reverse=True), sorted(protocol.lrs)
    settings = [(lr, decay) for decay in decays for lr in rates]

    def fit_candidates(kept: Tensor) -> Iterable[tuple[Setting, LinearClassifier]]:
        found = fit_together(
            features[kept], labels[kept], settings, classes=classes, protocol=protocol, seed=seed
        )
        return zip(settings, found, strict=True)

    lr, decay = choose_on_held_out(features, labels, seed, fit_candidates)
    chosen = replace(protocol, solver="sgd", lr=lr, weight_decay=decay)
    classifier = fit_iterated(features, labels, classes=classes, protocol=chosen, seed=seed)
    return classifier, (lr, decay)


def fit_together(
    features: Tensor,
    labels: Tensor,
    settings: Sequence[Setting],
    *,
    classes: int,
    protocol: Protocol,
    seed: int,
) -> list[LinearClassifier]:
    """A classifier for each setting, as `fit_iterated` by SGD returns it up to rounding.

    Takes memory for 4 k K d numbers and for k K logits of each image in a batch. Arguments are
    those of `fit_best_sgd`.
    """
    generator = torch.Generator().manual_seed(seed)
    features, mean, scale = standardization(features.float(), protocol)
    n, batch, k = len(features), protocol.batch_for(len(features)), len(settings)
    parameters = [
        start.to(features.device).expand(k, *start.shape).clone().requires_grad_()
        for start in initial_weights(features.shape[1], classes, protocol, generator)
    ]
    weight, bias = parameters  # [k, K, d], [k, K]
    buffers = [torch.zeros_like(parameter) for parameter in parameters]
    rates, decays = torch.tensor(settings, dtype=torch.float64).T.to(weight)  # [k] each
    with torch.enable_grad():
        for epoch in range(protocol.epochs):
            order = torch.randperm(n, generator=generator).to(features.device)
            lr = rates * protocol.decay_at(epoch)
            for rows in order[: protocol.images_per_epoch(n, batch)].split(batch):
                flat = F.linear(features[rows], weight.flatten(0, 1), bias.flatten())
                logits = flat.view(-1, k, classes).transpose(1, 2)  # [b, K, k]
                targets = labels[rows, None].expand(-1, k)
                losses = F.cross_entropy(logits, targets, reduction="sum") / len(rows)
                gradients = torch.autograd.grad(losses, parameters)
                with torch.no_grad():
                    for p, gradient, buffer in zip(parameters, gradients, buffers, strict=True):
                        shape = (k, *[1] * (p.ndim - 1))
                        buffer.mul_(protocol.momentum).add_(gradient + decays.view(shape) * p)
                        p.sub_(lr.view(shape) * buffer)
    weight, bias = weight.detach(), bias.detach()
    return [fold(weight[i], bias[i], mean, scale) for i in range(k)]
