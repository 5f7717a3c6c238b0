"""Inner products of rows of projections, as exact as an engine needs them.

In float64 if `wide` or for float64 values, else in float32 (three products of tf32 on a GPU).
Products of 16-bit values are exact in float32, but their sums are rounded to 6e-8 |x| |y|, which
is 6 % of an eigenvalue at s = 1e-3 s_max. So `wide` widens 16-bit values too.
"""

import torch
from torch import Tensor

from rdm_kernels import gram, product

WIDE = torch.float64
# Rows; smaller products waste a CPU, larger ones compute more entries that are mirrored.
BLOCK = 64


def gram_matrix(X: Tensor, *, samples: bool, wide: bool) -> Tensor:
    """X X^T (samples) or X^T X of each batch, [v, n, n], for X [v, B, D]."""
    if wide or X.dtype == WIDE:
        X = X.to(WIDE)
        return _lower_products(X if samples else X.mT)
    return gram(X, side="samples" if samples else "features")


def gram_and_swapped(X: Tensor, *, wide: bool) -> tuple[Tensor, Tensor]:
    """X_i X_i^T and X_(1-i) X_i^T of two batches X [2, B, D], each [2, B, B].

    Both come from one product, [X1; X2] [X1; X2]^T, half of which is mirrored.
    """
    B = X.shape[1]
    if wide or X.dtype == WIDE:
        K = _lower_products(X.flatten(0, 1)[None].to(WIDE))[0]
    else:
        K = gram(X, side="samples", stacked=True)[0]
    blocks = torch.stack([K[:B, :B], K[B:, B:], K[B:, :B], K[:B, B:]])
    return blocks[:2], blocks[2:]


def inner_products(Z: Tensor, X: Tensor, *, wide: bool) -> Tensor:
    """Z X^T, [v, b, B], for Z [v, b, D] and X [v, B, D] of one dtype."""
    if wide or X.dtype == WIDE:
        return Z.to(WIDE) @ X.to(WIDE).mT
    if X.dtype.itemsize == 2 and X.device.type == "cuda":
        return torch.bmm(Z, X.mT, out_dtype=torch.float32)
    return product(Z.float(), X.float().mT)


def _lower_products(X: Tensor) -> Tensor:
    """X X^T, [v, n, n]; a CPU multiplies blocks on or under the diagonal only."""
    if X.device.type != "cpu":  # one launch; the blocks would be fifty
        return torch.bmm(X, X.mT)
    n = X.shape[1]
    G = X.new_empty(X.shape[0], n, n)
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        G[:, rows, : rows.stop] = X[:, rows] @ X[:, : rows.stop].mT
        G[:, : rows.start, rows] = G[:, rows, : rows.start].mT
    return G
