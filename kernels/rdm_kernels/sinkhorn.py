"""Sinkhorn: assignments of rows to prototypes, with every prototype used equally.

    q = r E u,   E = exp((l - 1) / epsilon)

One iteration sets u so that the columns of r E u sum to 1 / K, then r so that its rows sum to
1 / B; at the end the rows sum to 1 (SwAV, arXiv:2006.09882). Scores l are cosines, so E is at most
1, and no maximum has to be found. A row or column whose sum is 0 stays 0: rows of scores -inf take
no part.

`rdm::sinkhorn` is defined by its PyTorch body.
"""

import torch
from torch import Tensor

from rdm_kernels.ops import define_op, describe

DTYPES = (torch.float32, torch.float64)


def sinkhorn(scores: Tensor, epsilon: Tensor, iterations: int) -> Tensor:
    """Assignments of the rows of each matrix to its columns.

    Args:
        scores: cosines l, [v, B, K], float32 or float64, not empty; at most 1, or -inf in a whole
            row. Takes no gradient.
        epsilon: scalar tensor on the device, at least 0.03, so that float32 holds every E.
        iterations: at least 1.

    Returns:
        [v, B, K] in the scores' dtype; rows sum to 1, or to 0 where all scores are -inf.

    Raises:
        ValueError: a shape, a dtype or the number of iterations does not fit.
    """
    fit = scores.ndim == 3 and scores.numel() and epsilon.numel() == 1 and iterations > 0
    if not fit or scores.dtype not in DTYPES:
        raise ValueError(
            "sinkhorn needs scores [v, B, K] in float32 or float64, a scalar epsilon and at least "
            f"one iteration, got {describe(scores=scores, epsilon=epsilon)}, {iterations}"
        )
    with torch.autocast(scores.device.type, enabled=False):
        return sinkhorn_op(scores.detach(), epsilon.detach(), iterations)


def define_sinkhorn(scores: Tensor, epsilon: Tensor, iterations: int) -> Tensor:
    v, B, K = scores.shape
    E = ((scores - 1) / epsilon.to(scores.dtype)).exp_()
    r = E.new_ones(v, 1, B)
    for _ in range(iterations):
        u = _inverse(K * (r @ E))  # [v, 1, K]
        r = _inverse(B * (u @ E.mT))
    return E.mul_(u).mul_(B * r.mT).contiguous()


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return x.reciprocal().where(x != 0, 0)


sinkhorn_op = define_op("sinkhorn", define_sinkhorn)
