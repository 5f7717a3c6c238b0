"""Cross-entropy between views over prototypes, and what it is made of (DINO, SwAV).

    l    = z C^T                                           cosines with K prototypes
    q    = softmax((l - c) / tau)                          a target's assignment
    loss = -mean_b sum_k Q_bk log softmax(l_b / tau)_k     Q: the sum of a view's targets

A view with several targets is read once: its loss depends on their sum only (multi-crop). The
gradient is (|Q|_1 softmax(l / tau) - Q) / tau. Logits are float32, whatever the dtype of their
factors: a 16-bit cosine is rounded to 2^-8, which tau = 0.04 would turn into 10 % of q.

Forward reads logits and targets once, and writes three numbers a row; backward reads them once more
and writes the gradient. Logits of v views, b rows and K prototypes are 4 v b K bytes, 168 MB for 10
views of 64 rows and K = 65,536; as much again for the gradient, and 8 b K for two targets.

`rdm::prototype_loss`, its backward and `rdm::centered_softmax` are defined by their PyTorch bodies;
Triton kernels replace them on CUDA, except for float64.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.ops import cuda_launcher, define_op, describe
from rdm_kernels.tiles import aligned
from rdm_kernels.variant import FP32, Variant

DTYPES = (torch.float32, torch.float64)


def prototype_logits(z: Tensor, C: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """z C^T with factors in a 16-bit dtype and sums in float32; differentiable.

    Args:
        z: rows of unit length, [..., D], float32 or float64.
        C: prototypes of unit length, [K, D], same dtype.
        dtype: of the factors, and of those in the gradient; None leaves them as they are.

    Returns:
        [..., K] in z's dtype.
    """
    with torch.autocast(z.device.type, enabled=False):
        if dtype is None:
            return z @ C.mT
        logits: Tensor = _Logits.apply(z.flatten(0, -2), C, dtype)
        return logits.view(*z.shape[:-1], len(C))


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, C: Tensor, dtype: torch.dtype) -> Tensor:
        z, C = z.to(dtype), C.to(dtype)
        ctx.save_for_backward(z, C)
        return _wide_product(z, C.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, C = ctx.saved_tensors
        grad = grad.to(z.dtype)
        return _wide_product(grad, C), _wide_product(grad.mT, z), None


def _wide_product(A: Tensor, B: Tensor) -> Tensor:
    """A B of 16-bit matrices, summed and returned in float32."""
    if A.device.type == "cuda":
        return torch.mm(A, B, out_dtype=torch.float32)
    return A.float() @ B.float()


def centered_softmax(scores: Tensor, center: Tensor | None, temperature: Tensor) -> Tensor:
    """softmax((l - c) / tau) of each row.

    Args:
        scores: l, [v, b, K], float32 or float64. Takes no gradient.
        center: c, [K], same dtype; None for no center.
        temperature: tau, a scalar tensor on the device.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    fit = scores.ndim == 3 and scores.numel() and temperature.numel() == 1
    if center is not None:
        fit = fit and (center.shape, center.dtype) == (scores.shape[2:], scores.dtype)
    if not fit or scores.dtype not in DTYPES:
        raise ValueError(
            "centered_softmax needs scores [v, b, K] in float32 or float64, a center [K] like them "
            f"and a scalar, got {describe(scores=scores, center=center, temperature=temperature)}"
        )
    with torch.autocast(scores.device.type, enabled=False):
        return centered_softmax_op(scores.detach(), center, temperature.detach())


def prototype_loss(logits: Tensor, q: Tensor, temperature: float) -> Tensor:
    """The loss of each view, summed over its targets.

    Args:
        logits: l, [v, b, K], float32 or float64.
        q: targets, [t, b, K], same dtype, t at most v; no gradient reaches them. The first t views
            have one target each, q[0] to q[t - 1], and all further ones every target.
        temperature: tau.

    Returns:
        [v] in the logits' dtype. If the loss of a row is not finite, neither is its view's, and
        only that row's gradient is zero.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    fit = logits.ndim == q.ndim == 3 and logits.numel() and q.numel()
    fit = fit and logits.shape[1:] == q.shape[1:] and len(q) <= len(logits)
    if not fit or logits.dtype != q.dtype or logits.dtype not in DTYPES:
        raise ValueError(
            "prototype_loss needs logits [v, b, K] and q [t, b, K], t at most v, both float32 or "
            f"both float64, got {describe(logits=logits, q=q)}"
        )
    loss, *_ = prototype_loss_op(logits, q.detach(), temperature)
    return loss


# ---- the ops, defined by their bodies --------------------------------------------------------


def define_centered_softmax(scores: Tensor, center: Tensor | None, temperature: Tensor) -> Tensor:
    scores = scores if center is None else scores - center
    return (scores / temperature.to(scores.dtype)).softmax(dim=-1).contiguous()


def targets_of_views(q: Tensor, n: int) -> Tensor:
    """The summed targets Q of n views, [n, b, K]."""
    return q if n == len(q) else torch.cat([q, q.sum(dim=0).expand(n - len(q), -1, -1)])


def define_prototype_loss(
    logits: Tensor, q: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [v], and of each row [v, b] its loss, log-sum-exp and |Q|_1."""
    x, Q = logits / temperature, targets_of_views(q, len(logits))
    lse, mass = x.logsumexp(dim=-1), Q.sum(dim=-1)
    rows = mass * lse - (Q * x).sum(dim=-1)
    return rows.mean(dim=-1), rows, lse, mass


def define_prototype_loss_backward(
    grad: Tensor, logits: Tensor, q: Tensor, rows: Tensor, lse: Tensor, mass: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    """Gradient of grad . loss for the logits; zero in rows whose loss is not finite."""
    share = (grad / (logits.shape[1] * temperature))[:, None, None]
    p = (logits / temperature - lse[..., None]).exp_().mul_(mass[..., None])
    d = p.sub_(targets_of_views(q, len(logits))).mul_(share)
    return d.masked_fill_(~rows.isfinite()[..., None], 0).contiguous()


centered_softmax_op = define_op("centered_softmax", define_centered_softmax)
prototype_loss_op = define_op("prototype_loss", define_prototype_loss)
prototype_loss_backward = define_op("prototype_loss_backward", define_prototype_loss_backward)


def _save(ctx, inputs, output):
    logits, q, ctx.temperature = inputs
    _, *rows = output
    ctx.save_for_backward(logits, q, *rows)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_grads_of_rows):
    if grad is None:
        return None, None, None
    return prototype_loss_backward(grad, *ctx.saved_tensors, ctx.temperature), None, None


prototype_loss_op.register_autograd(_backward, setup_context=_save)


# ---- the Triton kernels ------------------------------------------------------------------------

LOW = tl.constexpr(-1e30)  # below every logit, and finite: two of them differ by 0


@triton.jit
def _add_exp(m, total, x):
    """The largest value of each lane and the sum of exp(value - largest), with one more value."""
    larger = tl.maximum(m, x)
    return larger, total * tl.exp(m - larger) + tl.exp(x - larger)


@triton.jit
def _combine_exp(m, total):
    """The largest of all lanes, and their sum of exp(value - largest)."""
    largest = tl.max(m, axis=0)
    return largest, tl.sum(total * tl.exp(m - largest), axis=0)


@triton.jit
def _centered_softmax_kernel(l_ptr, c_ptr, tau_ptr, q_ptr, K, BLOCK: tl.constexpr):
    """One row per program, read twice."""
    row = tl.program_id(0).to(tl.int64) * K
    lanes = tl.arange(0, BLOCK)
    scale = 1.0 / tl.load(tau_ptr)
    m = tl.full((BLOCK,), LOW, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        at = start + lanes
        x = tl.load(l_ptr + row + at, mask=at < K, other=0.0)
        if c_ptr is not None:
            x -= tl.load(c_ptr + at, mask=at < K, other=0.0)
        m, total = _add_exp(m, total, tl.where(at < K, x * scale, LOW))
    largest, summed = _combine_exp(m, total)
    for start in range(0, K, BLOCK):
        at = start + lanes
        x = tl.load(l_ptr + row + at, mask=at < K, other=0.0)
        if c_ptr is not None:
            x -= tl.load(c_ptr + at, mask=at < K, other=0.0)
        tl.store(q_ptr + row + at, tl.exp(x * scale - largest) / summed, mask=at < K)


@triton.jit
def _row_and_targets(b, targets):
    """This program's row, which is row i of view s, and its targets, first to last - 1.

    View s has target s, or all targets if there is none of that number.
    """
    row = tl.program_id(0).to(tl.int64)
    s, i = (row // b).to(tl.int32), row % b
    first, last = tl.where(s < targets, s, 0), tl.where(s < targets, s + 1, targets)
    return row, s, i, first, last


@triton.jit
def _summed_targets(q_ptr, first, last, i, b, K, at):
    """Columns `at` of row i, summed over targets first to last - 1."""
    Q = tl.zeros_like(at).to(tl.float32)
    q_ptr += (first.to(tl.int64) * b + i) * K
    for _ in range(first, last):
        Q += tl.load(q_ptr + at, mask=at < K, other=0.0)
        q_ptr += b.to(tl.int64) * K
    return Q


@triton.jit(do_not_specialize=["b", "targets"])
def _prototype_loss_fwd_kernel(
    l_ptr, q_ptr, rows_ptr, lse_ptr, mass_ptr,
    b, targets, K, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, log-sum-exp and |Q|_1 of one row."""
    row, _s, i, first, last = _row_and_targets(b, targets)
    lanes = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), LOW, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    dot = tl.zeros((BLOCK,), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        at = start + lanes
        x = tl.load(l_ptr + row * K + at, mask=at < K, other=0.0) * scale
        Q = _summed_targets(q_ptr, first, last, i, b, K, at)
        m, total = _add_exp(m, total, tl.where(at < K, x, LOW))
        dot += Q * x
        mass += Q
    largest, summed = _combine_exp(m, total)
    lse, mass_of_row = largest + tl.log(summed), tl.sum(mass, axis=0)
    tl.store(rows_ptr + row, mass_of_row * lse - tl.sum(dot, axis=0))
    tl.store(lse_ptr + row, lse)
    tl.store(mass_ptr + row, mass_of_row)


@triton.jit(do_not_specialize=["b", "targets"])
def _prototype_loss_bwd_kernel(
    grad_ptr, l_ptr, q_ptr, rows_ptr, lse_ptr, mass_ptr, d_ptr,
    b, targets, K, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one row."""
    row, s, i, first, last = _row_and_targets(b, targets)
    lanes = tl.arange(0, BLOCK)
    share = tl.load(grad_ptr + s) * scale / b.to(tl.float32)
    lse, mass = tl.load(lse_ptr + row), tl.load(mass_ptr + row)
    is_finite = tl.abs(tl.load(rows_ptr + row)) < float("inf")
    for start in range(0, K, BLOCK):
        at = start + lanes
        x = tl.load(l_ptr + row * K + at, mask=at < K, other=0.0) * scale
        Q = _summed_targets(q_ptr, first, last, i, b, K, at)
        d = (mass * tl.exp(x - lse) - Q) * share
        tl.store(d_ptr + row * K + at, tl.where(is_finite, d, 0.0), mask=at < K)


ROWS = {"BLOCK": 1024, "num_warps": 4}
GRADIENT = {"BLOCK": 512, "num_warps": 4}  # 1024 spills on sm_100


@cuda_launcher(centered_softmax_op)
def centered_softmax_triton(scores: Tensor, center: Tensor | None, temperature: Tensor) -> Tensor:
    if scores.dtype == torch.float64:
        return define_centered_softmax(scores, center, temperature)
    v, b, K = scores.shape
    q = scores.new_empty(v, b, K)
    c = None if center is None else aligned(center)
    tau = aligned(temperature.float())
    _centered_softmax_kernel[(v * b,)](aligned(scores), c, tau, q, K, **ROWS)
    return q


@cuda_launcher(prototype_loss_op)
def prototype_loss_triton(
    logits: Tensor, q: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if logits.dtype == torch.float64:
        return define_prototype_loss(logits, q, temperature)
    v, b, K = logits.shape
    rows, lse, mass = (logits.new_empty(v, b) for _ in range(3))
    _prototype_loss_fwd_kernel[(v * b,)](
        aligned(logits), aligned(q), rows, lse, mass, b, len(q), K, 1 / temperature, **ROWS
    )
    return rows.mean(dim=-1), rows, lse, mass


@cuda_launcher(prototype_loss_backward)
def prototype_loss_backward_triton(
    grad: Tensor, logits: Tensor, q: Tensor, rows: Tensor, lse: Tensor, mass: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    if logits.dtype == torch.float64:
        return define_prototype_loss_backward(grad, logits, q, rows, lse, mass, temperature)
    v, b, K = logits.shape
    d = logits.new_empty(v, b, K)
    inputs = [aligned(x) for x in (grad, logits, q, rows, lse, mass)]
    _prototype_loss_bwd_kernel[(v * b,)](*inputs, d, b, len(q), K, 1 / temperature, **GRADIENT)
    return d


def variants() -> list[Variant]:
    """The loss and its gradient; the softmax with and without a center."""
    sizes = {"b": "i32", "targets": "i32", "K": "i32", "scale": "fp32"}
    rows = dict.fromkeys(("l_ptr", "q_ptr", "rows_ptr", "lse_ptr", "mass_ptr"), FP32) | sizes
    softmax = dict.fromkeys(("l_ptr", "tau_ptr", "q_ptr"), FP32) | {"K": "i32"}
    return [
        Variant(_prototype_loss_fwd_kernel, rows, ROWS),
        Variant(_prototype_loss_bwd_kernel, rows | {"grad_ptr": FP32, "d_ptr": FP32}, GRADIENT),
        Variant(_centered_softmax_kernel, softmax | {"c_ptr": FP32}, ROWS),
        Variant(_centered_softmax_kernel, softmax, {"c_ptr": None} | ROWS),
    ]
