"""Linear classifiers on frozen embeddings, by SGD, by LARS and in closed form.

All of them take raw embeddings: if a protocol standardizes, the scaling is folded into weight and
bias. Every function depends on its arguments only and leaves the global random state alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_fast.evaluation.accuracy import check_labels, rank_classes, topk_accuracy
from rdm_fast.evaluation.protocols import Protocol
from rdm_fast.optim import Lars

RIDGE_GRID = tuple(10.0**exponent for exponent in range(-8, 2))
"""Candidates for lambda, as multiples of the mean eigenvalue of the embeddings' scatter matrix."""
ROWS = 16_384
"""Rows that are converted to float64 at a time."""
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class LinearClassifier:
    """logits = x W^T + b; `weight` is [K, d] and `bias` [K], both float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Scores of each class, [N, K], for embeddings [N, d]."""
        return features.float() @ self.weight.mT + self.bias

    def to(self, device: torch.device) -> "LinearClassifier":
        """A copy on a device."""
        return LinearClassifier(self.weight.to(device), self.bias.to(device))


# ---- by gradient descent -----------------------------------------------------------------------


def fit_iterated(
    features: Tensor, labels: Tensor, *, classes: int, protocol: Protocol, seed: int
) -> LinearClassifier:
    """Minimize cross-entropy by mini-batch SGD or LARS.

    Args:
        features: embeddings, [N, d]; the fit runs on their device.
        labels: [N] int64 class ids.
        classes: number of classes K.
        protocol: solver sgd or lars, epochs, batch, schedule and so on.
        seed: of the initial weights and the order of images.

    Raises:
        ValueError: features and labels do not match.
    """
    check_labels(features, labels, classes, "training")
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same order on any device
    features, mean, scale = standardization(features.float(), protocol)
    n, batch = len(features), protocol.batch_for(len(features))
    weight, bias = (
        parameter.to(features.device).requires_grad_()
        for parameter in initial_weights(features.shape[1], classes, protocol, generator)
    )
    optimizer = build_optimizer([weight, bias], protocol)
    with torch.enable_grad():
        for epoch in range(protocol.epochs):
            for group in optimizer.param_groups:
                group["lr"] = protocol.lr_at(epoch)
            order = torch.randperm(n, generator=generator).to(features.device)
            for rows in order[: protocol.images_per_epoch(n, batch)].split(batch):
                loss = F.cross_entropy(F.linear(features[rows], weight, bias), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return fold(weight.detach(), bias.detach(), mean, scale)


def build_optimizer(
    parameters: list[Tensor] | list[dict[str, Any]], protocol: Protocol
) -> torch.optim.Optimizer:
    """SGD, or LARS as in SimSiam's ImageNet evaluation (apex's LARC with clip=False).

    LARS multiplies the gradient of each tensor by trust |w| / (|g| + weight_decay |w| + 1e-8)
    before momentum; where a norm is zero, as the bias's at the start, the gradient is unchanged.
    """
    lr, momentum, decay = protocol.lr, protocol.momentum, protocol.weight_decay
    if protocol.solver == "lars":
        trust = protocol.trust_coefficient
        return Lars(parameters, lr, momentum, decay, trust_coefficient=trust, clip=False)
    return torch.optim.SGD(parameters, lr, momentum, weight_decay=decay)


def standardization(features: Tensor, protocol: Protocol) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings [N, d] that a protocol fits, and their mean [d] and scale [d].

    They are (x - mean) * scale, or x itself without `protocol.standardize`.
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
    bound = 1 / math.sqrt(d)  # as torch.nn.Linear
    return (
        weight.uniform_(-bound, bound, generator=generator),
        bias.uniform_(-bound, bound, generator=generator),
    )


def _reciprocal_deviation(mean: Tensor, variance: Tensor) -> Tensor:
    """1 / standard deviation of each dimension; 1 for a constant, up to float32 rounding."""
    deviation = variance.sqrt()
    return deviation.where(deviation > 1e-6 * mean.abs(), 1).reciprocal()


def fold(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> LinearClassifier:
    """From a classifier of standardized embeddings to one of raw embeddings."""
    weight = weight * scale
    return LinearClassifier(weight.float(), (bias - weight @ mean.to(weight.dtype)).float())


# ---- choosing a setting ------------------------------------------------------------------------


def split_held_out(n: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random tenth of n rows, and the rest, as indices on a device.

    Raises:
        ValueError: there are fewer than 2 rows.
    """
    if n < 2:
        raise ValueError(f"choosing a setting holds out a tenth of the training images: got {n}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)
    return order[: max(1, n // 10)], order[max(1, n // 10) :]


def choose_on_held_out(
    features: Tensor,
    labels: Tensor,
    seed: int,
    fit_candidates: Callable[[Tensor], Iterable[tuple[S, LinearClassifier]]],
) -> S:
    """The setting with the best accuracy on a held-out tenth; of equally good ones the first.

    Args:
        features: [N, d] training embeddings.
        labels: [N] int64.
        seed: of the random choice of the tenth.
        fit_candidates: from the indices of the other rows to each setting and its classifier.

    Raises:
        ValueError: there are fewer than 2 rows.
    """
    held_out, kept = split_held_out(len(features), seed, features.device)
    best: S | None = None
    best_accuracy = -math.inf
    for setting, classifier in fit_candidates(kept):
        logits, accuracy = classifier.logits(features[held_out]), -1.0
        if bool(logits.isfinite().all()):  # a learning rate that is too high diverges
            accuracy = topk_accuracy(rank_classes(logits, 1), labels[held_out], 1)
        if accuracy > best_accuracy:
            best, best_accuracy = setting, accuracy
    assert best is not None
    return best


# ---- closed form -------------------------------------------------------------------------------


def fit_closed_form(
    features: Tensor, labels: Tensor, *, classes: int, ridge: float, standardize: bool = False
) -> LinearClassifier:
    """Ridge regression of one-hot labels in float64, with an intercept that is not penalized.

    Minimizes sum_n |W x_n + b - onehot(y_n)|^2 + lambda |W|^2: with centered X and Y,
    W^T = (X^T X + lambda I)^-1 X^T Y.

    Args:
        features: embeddings, [N, d]; the d x d solve runs on their device.
        labels: [N] int64 class ids.
        classes: number of classes K.
        ridge: lambda > 0, on the scale of X^T X (which grows with N).
        standardize: penalize as if each dimension had unit variance.

    Raises:
        ValueError: features and labels do not match, or ridge is not positive.
    """
    check_labels(features, labels, classes, "training")
    if not (math.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge={ridge} is not a positive number: `choose_ridge` finds one")
    everything = torch.arange(len(features), device=features.device)
    moments = _moments(features, labels, everything, classes, standardize)
    penalized = moments.scatter + ridge * torch.eye(len(moments.scatter)).to(moments.scatter)
    return moments.classifier(torch.cholesky_solve(moments.cross, torch.linalg.cholesky(penalized)))


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
            largest wins. The other arguments are those of `fit_closed_form`.

    Returns:
        lambda for a fit to all of `features`, to be passed to `fit_closed_form`.

    Raises:
        ValueError: features and labels do not match, or there are fewer than 2 images.
    """
    check_labels(features, labels, classes, "training")

    def fit_candidates(kept: Tensor) -> Iterable[tuple[float, LinearClassifier]]:
        moments = _moments(features, labels, kept, classes, standardize)
        eigenvalues, V = torch.linalg.eigh(moments.scatter)
        rotated = V.mT @ moments.cross  # [d, K]
        for multiple in sorted(grid, reverse=True):
            ridge = _ridge(multiple, moments.scatter)
            weight = V @ (rotated / (eigenvalues.clamp_min(0) + ridge)[:, None])
            yield multiple, moments.classifier(weight)

    best = choose_on_held_out(features, labels, seed, fit_candidates)
    order = torch.cat(split_held_out(len(features), seed, features.device))
    return _ridge(best, _moments(features, labels, order, classes, standardize).scatter)


def _ridge(multiple: float, scatter: Tensor) -> float:
    mean_eigenvalue = float(scatter.diagonal().mean())
    return multiple * mean_eigenvalue or 1.0  # all embeddings equal: any lambda gives W = 0


@dataclass(frozen=True, slots=True)
class _Moments:
    """Sums over some images that determine their ridge regression; X is centered and scaled."""

    scatter: Tensor  # X^T X, [d, d] float64
    cross: Tensor  # X^T Y, [d, K] float64
    mean: Tensor  # of the raw embeddings, [d]
    scale: Tensor  # factor of each dimension, [d]
    shares: Tensor  # of the classes, [K]

    def classifier(self, weight: Tensor) -> LinearClassifier:
        """From W^T [d, K] for X to a classifier of raw embeddings."""
        return fold(weight.mT, self.shares, self.mean, self.scale)


def _moments(
    features: Tensor, labels: Tensor, rows: Tensor, classes: int, standardize: bool
) -> _Moments:
    """Of the images `rows`, ROWS at a time, which avoids a second copy of the embeddings."""
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
