"""Inner products of rows of projections, as exact as an engine needs them.

Products of 16-bit values are exact in float32, so only sums are rounded, to 6e-8 |x| |y|. Wider
values are multiplied in float32 (three products of tf32 on a GPU), or in float64 if `wide`;
float64 values always are. The result is float64 if `wide` or for float64 values, else float32.
"""

import torch
from torch import Tensor

from rdm_kernels import gram, product

WIDE = torch.float64
# Rows; smaller products waste a processor, larger ones compute more entries that are mirrored.
BLOCK = 64


def gram_matrix(X: Tensor, *, samples: bool, wide: bool) -> Tensor:
    """X X^T (samples) or X^T X of each batch, [v, n, n], for X [v, B, D]."""
    if _in_float64(X, wide):
        X = X.to(WIDE)
        return _lower_products(X if samples else X.mT)
    G = gram(X, side="samples" if samples else "features").matrix
    return G.to(WIDE) if wide else G


def gram_and_swapped(X: Tensor, *, wide: bool) -> tuple[Tensor, Tensor]:
    """X_i X_i^T and X_(1-i) X_i^T of two batches X [2, B, D], each [2, B, B].

    Both come from one product, [X1; X2] [X1; X2]^T, half of which is mirrored.
    """
    B = X.shape[1]
    if _in_float64(X, wide):
        K = _lower_products(X.flatten(0, 1)[None].to(WIDE))[0]
    else:
        K = gram(X, side="samples", stacked=True).matrix[0]
        K = K.to(WIDE) if wide else K
    return torch.stack([K[:B, :B], K[B:, B:]]), torch.stack([K[B:, :B], K[:B, B:]])


def inner_products(Z: Tensor, X: Tensor, *, wide: bool) -> Tensor:
    """Z X^T, [v, b, B], for Z [v, b, D] and X [v, B, D] of one dtype."""
    if _in_float64(X, wide):
        return Z.to(WIDE) @ X.to(WIDE).mT
    if X.dtype.itemsize == 2 and X.device.type == "cuda":
        inner = torch.bmm(Z, X.mT, out_dtype=torch.float32)
    else:
        inner = product(Z.float(), X.float().mT)
    return inner.to(WIDE) if wide else inner


def _in_float64(X: Tensor, wide: bool) -> bool:
    return X.dtype == WIDE or (wide and X.dtype.itemsize > 2)


def _lower_products(X: Tensor) -> Tensor:
    """X X^T, [v, n, n]; only blocks on or under the diagonal are multiplied."""
    n = X.shape[1]
    G = X.new_empty(X.shape[0], n, n)
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        G[:, rows, : rows.stop] = X[:, rows] @ X[:, : rows.stop].mT
        G[:, : rows.start, rows] = G[:, rows, : rows.start].mT
    return G
