"""Cosine loss of a spectrally filtered branch and its exact gradient, in one op.

The filter is W = X^T h X, with h = g(sqrt G) G^-1 and G = X X^T the Gram matrix of the global
batch X (or simply a [D, D] matrix W when D < B). W carries no gradient. One branch is filtered,
the other is not; with y the online rows and t the target rows,

    loss = -1/b sum_i cos_i,   cos_i = <y_i, t_i> / (|y_i| |t_i|)
    d loss / d y_i = a_i t_i + c_i y_i,   a_i = -1 / (b |y_i| |t_i|),   c_i = cos_i / (b |y_i|^2)

Samples (B <= D). Filtered rows are E X with E = g(sqrt G) restricted to this rank's rows, so
every quantity of the loss is a function of inner products: |E X|^2_i = (E G E^T)_ii and, with
O = other X^T, <(E X)_i, other_i> = sum_j E_ij O_ij. Filtered rows are never formed:

    filter on the online branch: y = E X, t = other, and dL/dp = (a t + c y) W
                                 = [(a O + c E G) h] X
    filter on the target branch: y = p, t = E X, and dL/dp = a (E X) + c p

Features (D < B). The same with W itself: y = p W, dL/dp = (a t + c y) W; or t = other W.

The gradient is complete when the loss is: backward only scales it. Under data parallelism each
rank passes its own rows of E, O and p, and gets its own rows of the gradient of its own mean.
Where an input is not finite the loss is NaN and the gradient is zero.
"""

import torch
from torch import Tensor

EPS = 1e-8  # smallest norm, as in torch.nn.functional.cosine_similarity


def filtered_cosine_samples(
    p: Tensor, other: Tensor, X: Tensor, E: Tensor, G: Tensor, h: Tensor | None
) -> Tensor:
    """Loss of each view, from inner products of samples; the filter acts on the rows of X.

    Args:
        p: online projections of this rank, [v, b, D], any floating dtype. Takes the gradient.
        other: rows of this rank's unfiltered branch, [v, b, D]: the targets when the filter is
            online, p itself when it is on the target.
        X: the global batch that the filtered rows combine, [v, B, D].
        E: this rank's rows of the filter, [v, b, B]; filtered rows are E X.
        G: X X^T, [v, B, B], in E's dtype, in which everything is computed.
        h: [v, B, B] when the filter is on the online branch, None when it is on the target.

    Returns:
        [v], the mean negative cosine of each view, in E's dtype.
    """
    empty = E.new_empty(0)
    loss, _ = filtered_cosine_samples_op(p, other, X, E, G, empty if h is None else h)
    return loss


def filtered_cosine_features(p: Tensor, other: Tensor, W: Tensor, online: bool) -> Tensor:
    """Loss of each view, from the filter matrix itself.

    Args:
        p: online projections of this rank, [v, b, D], any floating dtype. Takes the gradient.
        other: targets of this rank, [v, b, D], before any filter.
        W: the filter, [v, D, D], in the dtype in which everything is computed.
        online: the filter acts on p; otherwise on other.

    Returns:
        [v], the mean negative cosine of each view, in W's dtype.
    """
    loss, _ = filtered_cosine_features_op(p, other, W, online)
    return loss


# ---- the ops, defined by their bodies --------------------------------------------------------


def _cosine(dot: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-mean cos [v], and the coefficients a and c [v, b, 1], from <y_i, t_i>, |y_i| and |t_i|."""
    b = dot.shape[-1]
    a = -1 / (b * y.clamp_min(EPS) * t.clamp_min(EPS))
    loss = (a * dot).sum(dim=-1)
    c = torch.where(y > EPS, -a * dot / y.square(), 0)  # a clamped norm has no derivative
    return loss, a[..., None], c[..., None]


def _finish(loss: Tensor, gradient: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Zero the gradient of a view whose loss is not finite; at least float32."""
    gradient = torch.where(loss.isfinite()[:, None, None], gradient, 0)
    return loss, gradient.to(torch.promote_types(p.dtype, torch.float32))


@torch.library.custom_op("rdm::filtered_cosine_samples", mutates_args=())
def filtered_cosine_samples_op(
    p: Tensor, other: Tensor, X: Tensor, E: Tensor, G: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss [v] in E's dtype and dL/dp [v, b, D]; an empty h means a filter on the target."""
    other, X = other.to(E.dtype), X.to(E.dtype)
    EG = E @ G
    O = other @ X.mT
    dot = (E * O).sum(dim=-1)
    filtered_norm = (EG * E).sum(dim=-1).clamp_min(0).sqrt()
    other_norm = other.norm(dim=-1)
    if h.numel():
        loss, a, c = _cosine(dot, filtered_norm, other_norm)
        gradient = ((a * O + c * EG) @ h) @ X
    else:
        loss, a, c = _cosine(dot, other_norm, filtered_norm)
        gradient = (a * E) @ X + c * other
    return _finish(loss, gradient, p)


@torch.library.custom_op("rdm::filtered_cosine_features", mutates_args=())
def filtered_cosine_features_op(
    p: Tensor, other: Tensor, W: Tensor, online: bool
) -> tuple[Tensor, Tensor]:
    """Loss [v] in W's dtype and dL/dp [v, b, D]."""
    y, t = p.to(W.dtype), other.to(W.dtype)
    y, t = (y @ W, t) if online else (y, t @ W)
    loss, a, c = _cosine((y * t).sum(dim=-1), y.norm(dim=-1), t.norm(dim=-1))
    gradient = a * t + c * y
    return _finish(loss, gradient @ W if online else gradient, p)


# ---- fakes and autograd ----------------------------------------------------------------------


def _fake(p: Tensor, computed_in: Tensor) -> tuple[Tensor, Tensor]:
    gradient = p.new_empty(p.shape, dtype=torch.promote_types(p.dtype, torch.float32))
    return computed_in.new_empty(p.shape[0]), gradient


@filtered_cosine_samples_op.register_fake
def _(
    p: Tensor, other: Tensor, X: Tensor, E: Tensor, G: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    return _fake(p, E)


@filtered_cosine_features_op.register_fake
def _(p: Tensor, other: Tensor, W: Tensor, online: bool) -> tuple[Tensor, Tensor]:
    return _fake(p, W)


def _save(ctx, inputs, output):
    ctx.p_dtype = inputs[0].dtype
    ctx.inputs = len(inputs)
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, _grad_gradient):
    """The gradient of p; the other branch and the filter take none."""
    dp = None
    if grad_loss is not None:
        (gradient,) = ctx.saved_tensors
        dp = (grad_loss[:, None, None].to(gradient.dtype) * gradient).to(ctx.p_dtype)
    return (dp, *(None for _ in range(ctx.inputs - 1)))


for _op in (filtered_cosine_samples_op, filtered_cosine_features_op):
    _op.register_autograd(_backward, setup_context=_save)
