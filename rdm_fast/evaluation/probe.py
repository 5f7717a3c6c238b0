"""Linear classifiers on frozen embeddings, by SGD, by LARS and in closed form.

All three return weights for the embeddings as they are: a standardization, where a protocol
asks for one, is folded into weight and bias. Each is a function of its arguments alone; the
global random state is neither read nor moved.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_fast.evaluation.accuracy import check_labels, rank_classes, topk_accuracy
from rdm_fast.evaluation.protocols import Protocol
from rdm_fast.optim import Lars

RIDGE_GRID = tuple(10.0**exponent for exponent in range(-8, 2))
"""Candidates for lambda, as multiples of the mean eigenvalue of the embeddings' scatter matrix."""
ROWS = 16_384
"""Rows held in float64 at a time."""


@dataclass(frozen=True, slots=True)
class LinearClassifier:
    """logits = x W^T + b; `weight` is [K, d] and `bias` [K], both float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Scores of each class, [N, K], for embeddings [N, d]."""
        return features.float() @ self.weight.mT + self.bias

    def to(self, device: torch.device) -> "LinearClassifier":
        """The same one on a device."""
        return LinearClassifier(self.weight.to(device), self.bias.to(device))


def fit_sgd(
    features: Tensor, labels: Tensor, *, classes: int, protocol: Protocol, seed: int
) -> LinearClassifier:
    """Cross-entropy by mini-batch SGD with momentum.

    Args:
        features: embeddings, [N, d]; the fit runs on their device.
        labels: [N] int64 class ids.
        classes: number of classes K.
        protocol: epochs, batch, schedule and so on; its `solver` is not looked at.
        seed: of the initial weights and the order of images.

    Raises:
        ValueError: features and labels do not fit together.
    """

    def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, protocol.lr, protocol.momentum, weight_decay=protocol.weight_decay
        )

    return _descend(sgd, features, labels, classes, protocol, seed)


def fit_lars(
    features: Tensor, labels: Tensor, *, classes: int, protocol: Protocol, seed: int
) -> LinearClassifier:
    """Cross-entropy by SGD in apex's LARC with clip=False, as SimSiam's ImageNet evaluation.

    The gradient of weight and bias, each for itself, is multiplied by
    trust |w| / (|g| + weight_decay |w| + 1e-8) before momentum sees it; where a norm is zero, as
    the bias's at the start, it stays as it is. Arguments as in `fit_sgd`.

    Raises:
        ValueError: features and labels do not fit together.
    """

    def lars(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return Lars(
            parameters,
            lr=protocol.lr,
            momentum=protocol.momentum,
            weight_decay=protocol.weight_decay,
            trust_coefficient=protocol.trust_coefficient,
            clip=False,
        )

    return _descend(lars, features, labels, classes, protocol, seed)


def _descend(
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    features: Tensor,
    labels: Tensor,
    classes: int,
    protocol: Protocol,
    seed: int,
) -> LinearClassifier:
    check_labels(features, labels, classes, "training")
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so any device sees one order
    features, mean, scale = standardization(features.float(), protocol)
    n, batch = len(features), protocol.batch_for(len(features))
    weight, bias = (
        parameter.to(features.device).requires_grad_()
        for parameter in initial_weights(features.shape[1], classes, protocol, generator)
    )
    optimizer = make_optimizer([weight, bias])
    with torch.enable_grad():
        for epoch in range(protocol.epochs):
            for group in optimizer.param_groups:
                group["lr"] = protocol.lr_at(epoch)
            order = torch.randperm(n, generator=generator).to(features.device)
            # As in the reference the rest of an epoch is dropped: a batch of a few images would
            # move the weights as far as a full one, on far less evidence.
            for rows in order[: n - n % batch].split(batch):
                loss = F.cross_entropy(F.linear(features[rows], weight, bias), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return fold(weight.detach(), bias.detach(), mean, scale)


def standardization(features: Tensor, protocol: Protocol) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [N, d] as the protocol fits to them, their mean [d], and their scale [d].

    What is fitted is (x - mean) * scale; without `protocol.standardize`, x itself.
    """
    mean, scale = features.new_zeros(features.shape[1]), features.new_ones(features.shape[1])
    if not protocol.standardize:
        return features, mean, scale
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    scale = _reciprocal_deviation(mean, variance)
    return (features - mean).mul_(scale), mean, scale


def initial_weights(
    d: int, classes: int, protocol: Protocol, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Weight [K, d] and bias [K] before training, float32 on the CPU."""
    weight, bias = torch.empty(classes, d), torch.zeros(classes)
    if protocol.init == "normal":
        return weight.normal_(std=0.01, generator=generator), bias
    bound = 1 / math.sqrt(d)  # what torch.nn.Linear draws from
    return (
        weight.uniform_(-bound, bound, generator=generator),
        bias.uniform_(-bound, bound, generator=generator),
    )


def _reciprocal_deviation(mean: Tensor, variance: Tensor) -> Tensor:
    """1 / standard deviation of each dimension; 1 for a constant, up to float32 rounding."""
    deviation = variance.sqrt()
    return deviation.where(deviation > 1e-6 * mean.abs(), 1).reciprocal()


def fold(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> LinearClassifier:
    """The same classifier for embeddings that are not standardized."""
    weight = weight * scale
    return LinearClassifier(weight.float(), (bias - weight @ mean.to(weight.dtype)).float())


# ---- closed form -------------------------------------------------------------------------------


def fit_closed_form(
    features: Tensor, labels: Tensor, *, classes: int, ridge: float, standardize: bool = False
) -> LinearClassifier:
    """Ridge regression of one-hot labels with an intercept that is not penalised, in float64.

    Minimizes sum_n |W x_n + b - onehot(y_n)|^2 + lambda |W|^2: with centered X and Y,
    W^T = (X^T X + lambda I)^-1 X^T Y.

    Args:
        features: embeddings, [N, d]; the d x d solve runs on their device.
        labels: [N] int64 class ids.
        classes: number of classes K.
        ridge: lambda > 0, on the scale of X^T X (which grows with N).
        standardize: penalise as if each dimension had unit variance.

    Raises:
        ValueError: features and labels do not fit together, or ridge is not positive.
    """
    check_labels(features, labels, classes, "training")
    if not (math.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge={ridge} is not a positive number: `choose_ridge` finds one")
    everything = torch.arange(len(features), device=features.device)
    moments = _moments(features, labels, everything, classes, standardize)
    penalised = moments.scatter + ridge * torch.eye(len(moments.scatter)).to(moments.scatter)
    return moments.classifier(torch.cholesky_solve(moments.cross, torch.linalg.cholesky(penalised)))


def choose_ridge(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    seed: int,
    standardize: bool = False,
    grid: Sequence[float] = RIDGE_GRID,
) -> float:
    """The lambda with the best accuracy on a held-out tenth of the training images.

    Args:
        seed: of the random choice of that tenth.
        grid: candidates, as multiples of the mean eigenvalue of X^T X; of equally good ones the
            largest wins. The rest as in `fit_closed_form`.

    Returns:
        lambda for a fit to all of `features`, to be passed to `fit_closed_form`.

    Raises:
        ValueError: features and labels do not fit together, or there are fewer than 2 images.
    """
    check_labels(features, labels, classes, "training")
    n = len(features)
    if n < 2:
        raise ValueError(f"choosing lambda holds out a tenth of the training images: got {n} image")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(features.device)
    held_out, kept = order[: max(1, n // 10)], order[max(1, n // 10) :]

    moments = _moments(features, labels, kept, classes, standardize)
    eigenvalues, V = torch.linalg.eigh(moments.scatter)
    rotated = V.mT @ moments.cross  # [d, K]
    best, best_accuracy = max(grid), -1.0
    for multiple in sorted(grid, reverse=True):
        ridge = _ridge(multiple, moments.scatter)
        weight = V @ (rotated / (eigenvalues.clamp_min(0) + ridge)[:, None])
        ranking = rank_classes(moments.classifier(weight).logits(features[held_out]), 1)
        accuracy = topk_accuracy(ranking, labels[held_out], 1)
        if accuracy > best_accuracy:
            best, best_accuracy = multiple, accuracy
    return _ridge(best, _moments(features, labels, order, classes, standardize).scatter)


def _ridge(multiple: float, scatter: Tensor) -> float:
    mean_eigenvalue = float(scatter.diagonal().mean())
    return multiple * mean_eigenvalue or 1.0  # all embeddings equal: any lambda gives W = 0


@dataclass(frozen=True, slots=True)
class _Moments:
    """What ridge regression needs of some images, in float64: X is centered and scaled."""

    scatter: Tensor  # X^T X, [d, d]
    cross: Tensor  # X^T Y, [d, K]
    mean: Tensor  # of the raw embeddings, [d]
    scale: Tensor  # what they were multiplied by, [d]
    shares: Tensor  # of the classes, [K]

    def classifier(self, weight: Tensor) -> LinearClassifier:
        """From W^T [d, K] for X to a classifier of raw embeddings."""
        return fold(weight.mT, self.shares, self.mean, self.scale)


def _moments(
    features: Tensor, labels: Tensor, rows: Tensor, classes: int, standardize: bool
) -> _Moments:
    """Of the images `rows`, ROWS at a time, so that no second copy of the embeddings is needed."""
    d = features.shape[1]
    mean, scatter, cross = (
        torch.zeros(shape, dtype=torch.float64, device=features.device)
        for shape in ((d,), (d, d), (d, classes))
    )
    for part in rows.split(ROWS):
        mean += features[part].double().sum(dim=0) / len(rows)
    for part in rows.split(ROWS):
        X = features[part].double() - mean
        scatter += X.mT @ X
        cross += X.mT @ F.one_hot(labels[part], classes).double()  # X is centered: Y need not be
    scale = torch.ones_like(mean)
    if standardize:
        scale = _reciprocal_deviation(mean, scatter.diagonal() / len(rows))
    shares = torch.bincount(labels[rows], minlength=classes).double() / len(rows)
    return _Moments(scatter * scale * scale[:, None], cross * scale[:, None], mean, scale, shares)
