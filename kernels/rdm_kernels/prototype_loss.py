"""Cross-entropy between views over prototypes, and what it is made of (DINO, SwAV).

    l    = z C^T                                           cosines with K prototypes
    q    = softmax((l - c) / tau)                          a target's assignment
    loss = -mean_b sum_k Q_bk log softmax(l_b / tau)_k     Q: the sum of a view's targets

A view with several targets is read once: its loss depends on their sum only (multi-crop). The
gradient is (|Q|_1 softmax(l / tau) - Q) / tau. Logits are float32, whatever the dtype of their
factors: a 16-bit cosine is rounded to 2^-8, which tau = 0.04 would turn into 10 % of q.

`rdm::prototype_loss`, its backward and `rdm::centered_softmax` are defined by their PyTorch bodies.
"""

from typing import Any

import torch
from torch import Tensor

from rdm_kernels.ops import define_op, describe

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
