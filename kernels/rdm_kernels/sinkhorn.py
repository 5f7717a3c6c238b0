"""Sinkhorn: assignments of rows to prototypes, with every prototype used equally.

    q = r E u,   E = exp((l - 1) / epsilon)

One iteration sets u so that the columns of r E u sum to 1 / K, then r so that its rows sum to
1 / B; at the end the rows sum to 1 (SwAV, arXiv:2006.09882). Scores l are cosines, so E is at most
1, and no maximum has to be found. A row or column whose sum is 0 stays 0: rows of scores -inf take
no part.

An iteration of the kernels is two launches for all views, which read the scores and recompute E;
the last one also writes q. Relative error of an element in float32, u = 2^-24:

    (2 iterations + 1) (4 / epsilon + max(B, K) + 4) u

`rdm::sinkhorn` is defined by its PyTorch body; Triton kernels replace it on CUDA, except for
float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.ops import cuda_launcher, define_op, describe
from rdm_kernels.tiles import aligned
from rdm_kernels.variant import FP32, Variant

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


# ---- the Triton kernels ------------------------------------------------------------------------


@triton.jit
def _inverse_of(x):
    return tl.where(x == 0.0, 0.0, 1.0 / tl.where(x == 0.0, 1.0, x))


@triton.jit(do_not_specialize=["B"])
def _sinkhorn_columns_kernel(
    l_ptr, epsilon_ptr, r_ptr, u_ptr, B, K, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr
):
    """u of BLOCK_K columns of view z from r, or from ones; BLOCK_B rows at a time."""
    z = tl.program_id(1).to(tl.int64)
    rows, col = tl.arange(0, BLOCK_B)[:, None], tl.program_id(0) * BLOCK_K
    cols = tl.arange(0, BLOCK_K)[None, :]
    scale = 1.0 / tl.load(epsilon_ptr)
    l_ptr += z * B * K + col
    acc = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for start in range(0, B, BLOCK_B):
        inside = (rows < B - start) & (cols < K - col)
        # Offsets within a tile have 32 bits.
        x = tl.load(l_ptr + rows * K + cols, mask=inside, other=float("-inf"))
        e = tl.exp((x - 1.0) * scale)
        if r_ptr is not None:
            e *= tl.load(r_ptr + z * B + start + rows, mask=rows < B - start, other=0.0)
        acc += e
        l_ptr += BLOCK_B * K
    u = _inverse_of(tl.sum(acc, axis=0) * K)
    at = col + tl.arange(0, BLOCK_K)
    tl.store(u_ptr + z * K + at, u, mask=at < K)


@triton.jit(do_not_specialize=["B"])
def _sinkhorn_rows_kernel(l_ptr, epsilon_ptr, u_ptr, r_ptr, q_ptr, B, K, BLOCK: tl.constexpr):
    """r of one row from u; or, in the last iteration, the row of q."""
    row = tl.program_id(0).to(tl.int64)
    l_ptr += row * K
    u_ptr += row // B * K
    lanes = tl.arange(0, BLOCK)
    scale = 1.0 / tl.load(epsilon_ptr)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        at = start + lanes
        x = tl.load(l_ptr + at, mask=at < K, other=float("-inf"))
        u = tl.load(u_ptr + at, mask=at < K, other=0.0)
        acc += tl.exp((x - 1.0) * scale) * u
    inverse = _inverse_of(tl.sum(acc, axis=0))
    if q_ptr is None:
        tl.store(r_ptr + row, inverse / B.to(tl.float32))
    else:
        for start in range(0, K, BLOCK):
            at = start + lanes
            x = tl.load(l_ptr + at, mask=at < K, other=float("-inf"))
            u = tl.load(u_ptr + at, mask=at < K, other=0.0)
            q = tl.exp((x - 1.0) * scale) * u * inverse
            tl.store(q_ptr + row * K + at, q, mask=at < K)


COLUMNS = {"BLOCK_B": 32, "BLOCK_K": 64, "num_warps": 4}
ROWS = {"BLOCK": 1024, "num_warps": 4}


@cuda_launcher(sinkhorn_op)
def sinkhorn_triton(scores: Tensor, epsilon: Tensor, iterations: int) -> Tensor:
    if scores.dtype == torch.float64:
        return define_sinkhorn(scores, epsilon, iterations)
    v, B, K = scores.shape
    scores, epsilon = aligned(scores), aligned(epsilon.float())
    r, u, q = scores.new_empty(v, B), scores.new_empty(v, K), scores.new_empty(v, B, K)
    for i in range(iterations):
        given, out = (r if i else None), (q if i == iterations - 1 else None)
        grid = (triton.cdiv(K, COLUMNS["BLOCK_K"]), v)
        _sinkhorn_columns_kernel[grid](scores, epsilon, given, u, B, K, **COLUMNS)
        _sinkhorn_rows_kernel[(v * B,)](scores, epsilon, u, r, out, B, K, **ROWS)
    return q


def variants() -> list[Variant]:
    """The first iteration, the last one and those between."""
    types = dict.fromkeys(("l_ptr", "epsilon_ptr", "u_ptr"), FP32) | {"B": "i32", "K": "i32"}
    rows = types | {"r_ptr": FP32}
    return [
        Variant(_sinkhorn_columns_kernel, types, {"r_ptr": None} | COLUMNS),
        Variant(_sinkhorn_columns_kernel, types | {"r_ptr": FP32}, COLUMNS),
        Variant(_sinkhorn_rows_kernel, rows, {"q_ptr": None} | ROWS),
        Variant(_sinkhorn_rows_kernel, rows | {"q_ptr": FP32}, ROWS),
    ]
