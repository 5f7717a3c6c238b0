"""Weighted nearest neighbors in the space of embeddings.

The k training images most similar to a query vote for their class with weight exp(cosine / T)
(Wu et al., arXiv:1805.01978, section 3.4), which needs no training and no tuning.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_fast.evaluation.accuracy import TOP, check_labels, rank_classes, topk_accuracy

MAX_SIMILARITIES = 2**26
"""Default limit on the similarities held at a time: 256 MiB of float32."""
SMALLEST_NORM = 1e-12
ROWS = 16_384
"""Rows of the bank that are normalized at a time."""


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The classes that each query's neighbors vote for, best first.

    Args:
        bank: embeddings of labeled images, [N, d].
        bank_labels: [N] int64 class ids.
        queries: embeddings to classify, [M, d], on the bank's device.
        classes: number of classes K, the largest label of bank and queries + 1.
        k: number of neighbors that vote.
        temperature: T > 0; the smaller, the more the nearest neighbors count.
        chunk: queries compared with the bank at a time; by default as many as keep the chunk's
            similarities and votes within MAX_SIMILARITIES each, and at least one.
        dtype: of the cosines: float32, or float16, which a GPU multiplies many times faster; by
            default float16 on a GPU. Its 11 bits swap neighbors whose cosines differ by less than
            5e-4.

    Returns:
        [M, min(5, K)] int64 class ids. Beyond the inputs, memory is bounded by
        chunk * (2 N + d + 2 K + O(k)) + N numbers, whatever M is (the factors 2 are the working
        space of top-k and sort); float16 adds N d numbers of 16 bits.

    Raises:
        ValueError: the bank has fewer than k images, or shapes, labels or temperature are wrong.
    """
    check_labels(bank, bank_labels, classes, "bank")
    if queries.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries must be [M, {bank.shape[1]}] like the bank: got {tuple(queries.shape)}"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"kNN needs 1 <= k <= images in the bank: got k={k} and {len(bank)}")
    if temperature <= 0:
        raise ValueError(f"kNN temperature={temperature} is not positive: use 0.07, for instance")
    if chunk is None:
        chunk = max(1, MAX_SIMILARITIES // max(len(bank), classes))
    if chunk < 1:
        raise ValueError(f"kNN chunk={chunk}: compare at least 1 query at a time")

    if dtype is None:
        dtype = torch.float16 if bank.is_cuda else torch.float32
    bank = bank.float()
    inverse_norms = bank.norm(dim=1).clamp_min(SMALLEST_NORM).reciprocal()  # [N]
    if dtype != torch.float32:  # unit rows, so that nothing overflows 16 bits
        bank = torch.cat([
            (rows * scale[:, None]).to(dtype)
            for rows, scale in zip(bank.split(ROWS), inverse_norms.split(ROWS), strict=True)
        ])  # fmt: skip
        inverse_norms = torch.ones_like(inverse_norms, dtype=dtype)
    rankings = []
    for part in queries.split(chunk):
        cosine = F.normalize(part.float(), dim=1).to(dtype) @ bank.mT  # [chunk, N]
        nearest, neighbors = cosine.mul_(inverse_norms).topk(k, dim=1)  # [chunk, k]
        nearest = nearest.float()
        # Relative to the nearest neighbor, which changes no ranking and cannot overflow.
        votes = ((nearest - nearest[:, :1]) / temperature).exp()
        totals = votes.new_zeros(len(part), classes)
        totals.scatter_add_(1, bank_labels[neighbors], votes)
        rankings.append(rank_classes(totals))
    return torch.cat(rankings)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy of `knn_predict` in percent; with fewer classes, over all of them.

    Args:
        query_labels: [M] int64 class ids of the queries; the rest as in `knn_predict`.

    Raises:
        ValueError: as `knn_predict`, or the query labels do not match the queries.
    """
    check_labels(queries, query_labels, classes, "query")
    ranking = knn_predict(bank, bank_labels, queries, classes=classes, k=k, temperature=temperature)
    return topk_accuracy(ranking, query_labels, 1), topk_accuracy(ranking, query_labels, TOP)
