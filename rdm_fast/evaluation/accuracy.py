"""Top-k accuracy: the one place that ranks classes and counts hits."""

import torch
from torch import Tensor

TOP = 5
"""The longest ranking that is reported."""


def rank_classes(scores: Tensor, k: int = TOP) -> Tensor:
    """The best classes of each row, best first; equal scores rank by class id.

    Args:
        scores: [M, K], higher is better.
        k: how many classes to return; all of them if K is smaller.

    Returns:
        [M, min(k, K)] int64 class ids.
    """
    # topk leaves the order of equal scores unspecified, so classes without a vote would rank by
    # chance.
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k]


def topk_accuracy(ranking: Tensor, labels: Tensor, k: int) -> float:
    """Percentage of rows whose label is among the first k classes of their ranking.

    Args:
        ranking: [M, r] class ids, best first; r < k means that all classes are ranked.
        labels: [M] class ids.

    Raises:
        ValueError: there are no rows, or the number of labels differs.
    """
    if ranking.ndim != 2 or labels.shape != ranking.shape[:1] or len(labels) == 0:
        raise ValueError(
            "topk_accuracy needs a [M, r] ranking and [M] labels, at least one row: got "
            f"{tuple(ranking.shape)} and {tuple(labels.shape)}"
        )
    hits = (ranking[:, :k] == labels[:, None]).any(dim=1)
    return 100.0 * int(hits.sum()) / len(hits)


def check_labels(features: Tensor, labels: Tensor, classes: int, where: str) -> None:
    """Check the shapes, dtypes and class ids of a set of labeled embeddings.

    Args:
        features: [N, d] floating.
        labels: [N] int64, from 0 to classes - 1.
        classes: number of classes K.
        where: name of the set in the message, such as "training".

    Raises:
        ValueError: features and labels do not match.
    """
    if features.ndim != 2 or not features.is_floating_point() or 0 in features.shape:
        raise ValueError(
            f"{where} features must be a non-empty floating [N, d] tensor: got "
            f"{features.dtype} {tuple(features.shape)}"
        )
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{where} labels must be int64, one for each of {len(features)} features: got "
            f"{labels.dtype} {tuple(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{where} labels run from {low} to {high}, but {classes} classes have ids 0 to "
            f"{classes - 1}: pass the largest label of all sets + 1 as the number of classes"
        )
