"""Every pair of learning rate and weight decay at once: k linear probes in one pass.

All k probes see the same batches, so their weights are one tensor [k, K, d] and their logits one
matrix product of a batch with k K rows. The gradient of the sum of their losses is each one's own.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_fast.evaluation.accuracy import check_labels, rank_classes, topk_accuracy
from rdm_fast.evaluation.probe import (
    LinearClassifier,
    fit_sgd,
    fold,
    initial_weights,
    standardization,
)
from rdm_fast.evaluation.protocols import Protocol

Setting = tuple[float, float]
"""Learning rate of the first epoch, and weight decay."""


def fit_sweep(
    features: Tensor, labels: Tensor, *, classes: int, protocol: Protocol, seed: int
) -> tuple[LinearClassifier, Setting]:
    """The best of protocol.lrs x protocol.weight_decays on a held-out tenth, fitted to all images.

    Args:
        features: embeddings, [N, d]; the fit runs on their device.
        labels: [N] int64 class ids.
        classes: number of classes K.
        protocol: epochs, batch, schedule, momentum and candidates.
        seed: of the held-out tenth, the initial weights and the order of images.

    Returns:
        The classifier, and what was chosen: of equally good settings the one with the largest
        decay, then the smallest rate.

    Raises:
        ValueError: features and labels do not fit together, or there are fewer than 2 images.
    """
    check_labels(features, labels, classes, "training")
    n = len(features)
    if n < 2:
        raise ValueError(f"a sweep holds out a tenth of the training images: got {n} image")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(features.device)
    held_out, kept = order[: max(1, n // 10)], order[max(1, n // 10) :]
    settings = [
        (lr, decay)
        for decay in sorted(protocol.weight_decays, reverse=True)
        for lr in sorted(protocol.lrs)
    ]
    candidates = fit_settings(
        features[kept], labels[kept], settings, classes=classes, protocol=protocol, seed=seed
    )
    best, best_accuracy = settings[0], -1.0
    for setting, classifier in zip(settings, candidates, strict=True):
        logits = classifier.logits(features[held_out])
        if bool(logits.isfinite().all()):  # a rate too high for these features diverges
            accuracy = topk_accuracy(rank_classes(logits, 1), labels[held_out], 1)
            if accuracy > best_accuracy:
                best, best_accuracy = setting, accuracy
    chosen = replace(protocol, solver="sgd", lr=best[0], weight_decay=best[1])
    return fit_sgd(features, labels, classes=classes, protocol=chosen, seed=seed), best


def fit_settings(
    features: Tensor,
    labels: Tensor,
    settings: Sequence[Setting],
    *,
    classes: int,
    protocol: Protocol,
    seed: int,
) -> list[LinearClassifier]:
    """What `fit_sgd` returns for each setting, up to rounding, from one pass over the images.

    Memory beyond the features is that of 4 k K d numbers and of k K logits for each image of a
    batch. Arguments as in `fit_sweep`.
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
            lr = rates * protocol.share_at(epoch)
            for rows in order[: n - n % batch].split(batch):
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
