"""The element-wise steps of `rdm_kernels.filter_factors`, a launch each: its start and its end.

`rdm::filter_start` and `rdm::filter_combine` are defined by their PyTorch bodies; Triton kernels
replace them on CUDA for float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.ops import cuda_launcher, define_op
from rdm_kernels.variant import FP32, POINTERS, Variant

NOT_FINITE = 1  # these two are bits of the status word
INACCURATE = 4
BITS = {"NOT_FINITE": NOT_FINITE, "INACCURATE": INACCURATE}

BLOCK = {"BLOCK": 1024, "num_warps": 4}


# ---- start: from X and its Gram matrix to the first step's matrices ------------------------------


def define_start(
    X: Tensor,
    G: Tensor,
    squared: Tensor,
    norm: Tensor,
    trace: Tensor,
    d: float,
    noise: float,
    coefficients: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X / sqrt(C), R = G / C + d, P = a + b R + c R^2 and sqrt(C) [v].

        C = max(|G^2|_F^(1/2) / (1 - d), noise^2 trace / d);   1 for zeros, NaN if not finite

    Args:
        X: [v, B, D], any floating dtype.
        G, squared: [v, n, n], X X^T or X^T X, and its square.
        norm, trace: [v], |G^2|_F and the trace of G, which is not finite if G is not.
        d, noise: numbers.
        coefficients: a, b and c.
    """
    (a, b, c), X, G, squared = coefficients, *(each.contiguous() for each in (X, G, squared))
    C = torch.maximum(norm.sqrt() / (1 - d), trace * (noise**2 / d))
    C = C.where(C != 0, 1).where(trace.isfinite(), torch.nan)
    root = C.sqrt()
    A = G / C[:, None, None]
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    R = A + d * identity
    R2 = squared / C[:, None, None] / C[:, None, None] + 2 * d * A + d**2 * identity
    return X / root[:, None, None], R, a * identity + b * R + c * R2, root


start = define_op("filter_start", define_start)


@triton.jit(do_not_specialize=["size", "n"])
def _start_kernel(
    X_ptr, G_ptr, squared_ptr, norm_ptr, trace_ptr,
    scaled_ptr, R_ptr, P_ptr, root_ptr,
    size, n, d, noise, a, b, c, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of X and one of the matrices per program; `size` is that of an X."""
    elements = n * n
    if ALIGNED:
        size, elements = tl.multiple_of(size, 16), tl.multiple_of(elements, 16)
    z = tl.program_id(1).to(tl.int64)
    trace = tl.load(trace_ptr + z)
    C = tl.maximum(tl.sqrt(tl.load(norm_ptr + z)) / (1 - d), trace * noise)
    C = tl.where(C != 0, C, 1.0)
    C = tl.where(trace < float("inf"), C, float("nan"))
    root = tl.sqrt(C)
    tl.store(root_ptr + z, root)

    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    X = tl.load(X_ptr + z * size + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + z * size + at, X / root, mask=at < size)

    inside = at < elements
    A = tl.load(G_ptr + z * elements + at, mask=inside, other=0.0) / C
    square = tl.load(squared_ptr + z * elements + at, mask=inside, other=0.0) / C / C
    identity = tl.where(at // n == at % n, 1.0, 0.0)
    R = A + d * identity
    P = a * identity + b * R + c * (square + 2 * d * A + d * d * identity)
    tl.store(R_ptr + z * elements + at, R, mask=inside)
    tl.store(P_ptr + z * elements + at, P, mask=inside)


@cuda_launcher(start)
def start_triton(
    X: Tensor,
    G: Tensor,
    squared: Tensor,
    norm: Tensor,
    trace: Tensor,
    d: float,
    noise: float,
    coefficients: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if G.dtype == torch.float64:
        return define_start(X, G, squared, norm, trace, d, noise, coefficients)
    X, G, squared, norm, trace = (given.contiguous() for given in (X, G, squared, norm, trace))
    v, n, _ = G.shape
    scaled = G.new_empty(X.shape)
    R, P, root = torch.empty_like(G), torch.empty_like(G), G.new_empty(v)
    size = X[0].numel()
    grid = (triton.cdiv(max(size, n * n), BLOCK["BLOCK"]), v)
    _start_kernel[grid](
        X, G, squared, norm, trace, scaled, R, P, root,
        size, n, d, noise**2 / d, *coefficients, ALIGNED=size % 16 == n % 4 == 0, **BLOCK,
    )  # fmt: skip
    return scaled, R, P, root


# ---- combine: functions of t as sums of the matrices, and the status word ------------------------


def define_combine(
    weights: Tensor,
    matrices: list[Tensor],
    root: Tensor,
    residual: Tensor,
    trace: Tensor,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two weighted sums [v, n, n] of the matrices, the second one times root, and the status [v].

    The sums are zero where the status is INACCURATE.

    Args:
        weights: [v, 2, j].
        matrices: j of [v, n, n].
        root: [v].
        residual: [v]; inaccurate above this limit, or if NaN.
        trace: [v]; the status is NOT_FINITE where it is not finite.
        limit: of residuals.
    """
    inaccurate = torch.where(residual <= limit, 0, INACCURATE)
    status = torch.where(trace.isfinite(), inaccurate, NOT_FINITE).to(torch.int32)
    sums = torch.zeros(2, *matrices[0].shape, dtype=weights.dtype, device=weights.device)
    for pair, matrix in zip(weights.unbind(2), matrices, strict=True):
        sums.addcmul_(pair.mT[:, :, None, None], matrix)
    sums = sums.where((status != INACCURATE)[:, None, None], 0)
    return sums[0].clone(), root[:, None, None] * sums[1], status


combine = define_op("filter_combine", define_combine)


@triton.jit(do_not_specialize=["size", "j"])
def _combine_kernel(
    stacked_ptr, weights_ptr, root_ptr, residual_ptr, trace_ptr, F_ptr, E_ptr, status_ptr,
    size, j, limit, ALIGNED: tl.constexpr, NOT_FINITE: tl.constexpr, INACCURATE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of both sums of j matrices per program; `size` is that of a matrix."""
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    z, v = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    status = tl.where(tl.load(residual_ptr + z) <= limit, 0, INACCURATE)
    status = tl.where(tl.load(trace_ptr + z) < float("inf"), status, NOT_FINITE)
    tl.store(status_ptr + z, status)

    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    F, E = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for i in range(j):
        M = tl.load(stacked_ptr + (i * v + z) * size + at, mask=at < size, other=0.0)
        F += tl.load(weights_ptr + z * 2 * j + i) * M
        E += tl.load(weights_ptr + z * 2 * j + j + i) * M
    E *= tl.load(root_ptr + z)
    tl.store(F_ptr + z * size + at, tl.where(status != INACCURATE, F, 0.0), mask=at < size)
    tl.store(E_ptr + z * size + at, tl.where(status != INACCURATE, E, 0.0), mask=at < size)


@cuda_launcher(combine)
def combine_triton(
    weights: Tensor,
    matrices: list[Tensor],
    root: Tensor,
    residual: Tensor,
    trace: Tensor,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if weights.dtype == torch.float64:
        return define_combine(weights, matrices, root, residual, trace, limit)
    weights, root, residual, trace = (
        given.contiguous() for given in (weights, root, residual, trace)
    )
    stacked, (v, n, _) = torch.stack(matrices), matrices[0].shape
    F, E = torch.empty_like(stacked[0]), torch.empty_like(stacked[0])
    status = torch.empty_like(trace, dtype=torch.int32)
    _combine_kernel[(triton.cdiv(n * n, BLOCK["BLOCK"]), v)](
        stacked, weights, root, residual, trace, F, E, status,
        n * n, len(matrices), limit, ALIGNED=n % 4 == 0, **BITS, **BLOCK,
    )  # fmt: skip
    return F, E, status


def variants() -> list[Variant]:
    """The start for every dtype of X, and the combination, at aligned and other sizes."""
    names = ("G_ptr", "squared_ptr", "norm_ptr", "trace_ptr", "scaled_ptr", "R_ptr", "P_ptr")
    start_types = dict.fromkeys((*names, "root_ptr"), FP32)
    start_types |= dict.fromkeys(("d", "noise", "a", "b", "c"), "fp32")
    start_types |= dict.fromkeys(("size", "n"), "i32")
    floats = (
        "stacked_ptr",
        "weights_ptr",
        "root_ptr",
        "residual_ptr",
        "trace_ptr",
        "F_ptr",
        "E_ptr",
    )
    types = dict.fromkeys(floats, FP32) | {"status_ptr": "*i32"}
    types |= {"size": "i32", "j": "i32", "limit": "fp32"}
    found = []
    for aligned in ({"ALIGNED": False}, {"ALIGNED": True}):
        for X in POINTERS.values():
            found.append(Variant(_start_kernel, {"X_ptr": X, **start_types}, BLOCK | aligned))
        found.append(Variant(_combine_kernel, types, BLOCK | BITS | aligned))
    return found
