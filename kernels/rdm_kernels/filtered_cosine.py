"""Cosine loss of a spectrally filtered branch and its exact gradient, in one op.

A filter W = V diag(g) V^T acts on the rows of one branch; it carries no gradient. V holds right
singular vectors of a global batch X = U S V^T, one a column, and everything happens in the
coordinates of that basis: p V and z V, [b, n], for the online and target rows p and z.

    online   y = p W has coordinates g pV, the target t = z is as it is
    target   t = z W has coordinates g zV, the online y = p is as it is

    loss = -1/b sum_i cos_i,   cos_i = <y_i, t_i> / (|y_i| |t_i|)
    dL/dy_i = a_i t_i + c_i y_i,   a_i = -1 / (b |y_i| |t_i|),   c_i = cos_i / (b |y_i|^2)

so that, with inner products taken in the basis (what lies outside it meets only zeros),

    online   dL/dp = dL/dy W = [(a zV + c g pV) g] V^T
    target   dL/dp = [a g zV] V^T + c p

On the smaller side of a batch with fewer samples than features, V^T = (U / S)^T X, and pV and zV
are inner products with X times U / S: no row is ever filtered, and loss and gradient cost one
product with X. With fewer features than samples, V is there itself.

The gradient is complete when the loss is: backward only scales it. Under data parallelism each
rank passes its own rows and gets its own rows of the gradient of its own mean. Where something is
not finite the loss is NaN and the gradient zero.
"""

import torch
from torch import Tensor

EPS = 1e-8  # smallest norm, as in torch.nn.functional.cosine_similarity


def filtered_cosine(
    p: Tensor,
    norm: Tensor,
    pV: Tensor,
    zV: Tensor,
    g: Tensor,
    basis: Tensor,
    X: Tensor | None,
    *,
    online: bool,
) -> Tensor:
    """Mean negative cosine of each view between online and target rows, one of them filtered.

    Args:
        p: online rows of this rank, [v, b, D], any floating dtype. Takes the gradient.
        norm: length of each row of the unfiltered branch, [v, b].
        pV, zV: coordinates of the online and target rows before any filter, [v, b, n].
        g: response of the filter, [v, n]; 0 where a direction is cut off.
        basis: V itself, [v, D, n], if X is None; else U / S, [v, B, n].
        X: the global batch whose V it is, [v, B, D], or None.
        online: the filter acts on the online branch; otherwise on the target.

    Returns:
        [v] in g's dtype, in which everything but the last product, that with X, is computed; that
        one amplifies rounding only by s_max / s and is float32. Only p takes a gradient.
    """
    empty = g.new_empty(0)
    loss, _ = filtered_cosine_op(p, norm, pV, zV, g, basis, empty if X is None else X, online)
    return loss


# ---- the op, defined by its body -------------------------------------------------------------


@torch.library.custom_op("rdm::filtered_cosine", mutates_args=())
def filtered_cosine_op(
    p: Tensor,
    norm: Tensor,
    pV: Tensor,
    zV: Tensor,
    g: Tensor,
    basis: Tensor,
    X: Tensor,
    online: bool,
) -> tuple[Tensor, Tensor]:
    """Loss [v] and dL/dp [v, b, D] of at least float32; an empty X means that basis is V."""
    g = g[:, None, :]
    yV, tV = (g * pV, zV) if online else (pV, g * zV)
    filtered_norm = (yV if online else tV).norm(dim=-1)
    y, t = (filtered_norm, norm) if online else (norm, filtered_norm)

    b = p.shape[1]
    dot = (yV * tV).sum(dim=-1)
    a = -1 / (b * y.clamp_min(EPS) * t.clamp_min(EPS))
    loss = (a * dot).sum(dim=-1)
    c = torch.where(y > EPS, -a * dot / y.square(), 0)  # a clamped norm has no derivative
    a, c = a[..., None], c[..., None]

    out = torch.promote_types(p.dtype, torch.float32)
    coordinates = (a * tV + c * yV) * g if online else a * tV
    gradient = (coordinates @ basis.mT).to(out)
    if X.numel():
        gradient = gradient @ X.to(out)
    if not online:
        gradient = gradient + c.to(out) * p.to(out)
    return loss, torch.where(loss.isfinite()[:, None, None], gradient, 0)


@filtered_cosine_op.register_fake
def _(
    p: Tensor,
    norm: Tensor,
    pV: Tensor,
    zV: Tensor,
    g: Tensor,
    basis: Tensor,
    X: Tensor,
    online: bool,
) -> tuple[Tensor, Tensor]:
    gradient = p.new_empty(p.shape, dtype=torch.promote_types(p.dtype, torch.float32))
    return g.new_empty(p.shape[0]), gradient


def _save(ctx, inputs, output):
    ctx.p_dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, _grad_gradient):
    dp = None
    if grad_loss is not None:
        (gradient,) = ctx.saved_tensors
        dp = (grad_loss[:, None, None].to(gradient.dtype) * gradient).to(ctx.p_dtype)
    return (dp, *(None,) * 7)


filtered_cosine_op.register_autograd(_backward, setup_context=_save)
