"""Cosine loss of spectrally filtered online rows and its exact gradient, without the rows.

A filter W = X^T h X of a global batch X [B, D] acts on the online rows: y_i = p_i W, and it carries
no gradient. Neither y nor dL/dy is ever formed: all that the loss needs of a row are two bilinear
forms, and all that its gradient needs is one product,

    |y_i|^2 = <alpha_i, beta_i>     <y_i, t_i> = <alpha_i, gamma_i>     (t_i the target row)

    cos_i = <y_i, t_i> / (|y_i| |t_i|)        loss = -1/b sum_i cos_i
    dL/dy_i = a_i t_i + c_i y_i,   a_i = -1 / (b |y_i| |t_i|),   c_i = cos_i / (b |y_i|^2)
    dL/dp = dL/dy W = N X,   N = (diag(a) gamma + diag(c) beta) R

with what the caller has at hand (X = U S V^T, G = X X^T, M = G h, rows of this rank):

    eigenvectors, samples      alpha = beta = pV g   gamma = tV      R = diag(g) (U / S)^T   X
    eigenvectors, features     alpha = beta = pV g   gamma = tV      R = diag(g) V^T         -
    matrix function, samples   alpha = M, beta = MG  gamma = t X^T   R = h                   X
    matrix function, features  alpha = beta = p W    gamma = t       R = W                   -
    h = 1, samples             alpha = G, beta = GG  gamma = t X^T   -                       X

Two ops. `rdm::filtered_cosine` gives the loss and N, which is of the smaller side; backward is
`rdm::apply_rows`, N X times what comes back, in p's dtype. Only dL/dp is ever as large as p. Under
data parallelism each rank passes its own rows and gets its own rows of the gradient of its own
mean. Where something is not finite the loss is NaN and the gradient zero.
"""

import torch
from torch import Tensor

EPS = 1e-8  # smallest norm, as in torch.nn.functional.cosine_similarity


def filtered_cosine(
    p: Tensor,
    norm: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    R: Tensor | None = None,
    X: Tensor | None = None,
) -> Tensor:
    """Mean negative cosine of each view between filtered online rows and target rows.

    Args:
        p: online rows of this rank, [v, b, D], any floating dtype. Takes the gradient; its values
            are not read.
        norm: length of each target row, [v, b].
        alpha, beta, gamma: [v, b, n], so that <alpha_i, beta_i> is the squared length of filtered
            row i and <alpha_i, gamma_i> its inner product with the target row. float32 or float64,
            one dtype for them, norm and R. beta may be alpha itself.
        R: [v, n, k]; None is the identity.
        X: the global batch, [v, k, D], any floating dtype; None is the identity.

    Returns:
        [v] in alpha's dtype, in which everything is computed but the last product, that with X:
        float64 for float64 p, else float32. NaN where a norm or a bilinear form is not finite;
        that view's gradient is then zero, whatever X holds. Only p takes a gradient.

    Raises:
        ValueError: the shapes or dtypes do not fit together.
    """
    v, b, D = p.shape
    n = alpha.shape[-1]
    k = n if R is None else R.shape[-1]
    fits = (
        norm.shape == (v, b)
        and alpha.shape == beta.shape == gamma.shape == (v, b, n)
        and (R is None or R.shape == (v, n, k))
        and (k == D if X is None else X.shape == (v, k, D))
    )
    given = {"norm": norm, "alpha": alpha, "beta": beta, "gamma": gamma, "R": R}
    dtypes = {x.dtype for x in given.values() if x is not None}
    if not fits or dtypes not in ({torch.float32}, {torch.float64}):
        found = {name: x for name, x in {"p": p, **given, "X": X}.items() if x is not None}
        raise ValueError(
            "filtered_cosine needs p [v, b, D], norm [v, b], alpha, beta, gamma [v, b, n], "
            "R [v, n, k] or None, X [v, k, D] or None, all but p and X float32 or all float64; got "
            + ", ".join(f"{name} {x.dtype} {tuple(x.shape)}" for name, x in found.items())
        )
    fixed = [None if x is None else x.detach() for x in (*given.values(), X)]
    with torch.autocast(p.device.type, enabled=False):
        loss, _ = filtered_cosine_op(p, *fixed)
    return loss


# ---- the ops, defined by their bodies --------------------------------------------------------


@torch.library.custom_op("rdm::filtered_cosine", mutates_args=())
def filtered_cosine_op(
    p: Tensor,
    norm: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    R: Tensor | None,
    X: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss [v] and N [v, b, k]. p is there for its gradient, and X is kept for backward."""
    square, dot = (alpha * beta).sum(dim=-1), (alpha * gamma).sum(dim=-1)
    y = square.clamp_min(0).sqrt()  # rounding may leave a square under zero
    a = -1 / (p.shape[1] * y.clamp_min(EPS) * norm.clamp_min(EPS))
    c = torch.where(y > EPS, -a * dot / square, 0)  # a clamped norm has no derivative

    finite = square.isfinite() & dot.isfinite() & norm.isfinite()
    loss = torch.where(finite, a * dot, torch.nan).sum(dim=-1)
    N = a[..., None] * gamma + c[..., None] * beta
    return loss, N if R is None else N @ R


@torch.library.custom_op("rdm::apply_rows", mutates_args=())
def apply_rows(
    N: Tensor, X: Tensor | None, scale: Tensor, loss: Tensor, dtype: torch.dtype
) -> Tensor:
    """scale N X of each view, [v, b, D] in this dtype; zero where the view's loss is not finite.

    N [v, b, k]; X [v, k, D], None for the identity; scale, loss [v]. The product is float64 for
    float64, else float32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    rows = (scale[:, None, None] * N).to(wide)
    rows = rows if X is None else rows @ X.to(wide)
    return torch.where(loss.isfinite()[:, None, None], rows, 0).to(dtype)


@filtered_cosine_op.register_fake
def _(
    p: Tensor,
    norm: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    R: Tensor | None,
    X: Tensor | None,
) -> tuple[Tensor, Tensor]:
    k = alpha.shape[2] if R is None else R.shape[2]
    return alpha.new_empty(p.shape[0]), alpha.new_empty(p.shape[0], p.shape[1], k)


@apply_rows.register_fake
def _(N: Tensor, X: Tensor | None, scale: Tensor, loss: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (N.shape[0], N.shape[1], N.shape[2] if X is None else X.shape[2])
    return N.new_empty(shape, dtype=dtype)


def _save(ctx, inputs, output):
    loss, N = output
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(N, inputs[-1], loss)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, _grad_N):
    dp = None
    if grad_loss is not None:
        N, X, loss = ctx.saved_tensors
        with torch.autocast(N.device.type, enabled=False):
            dp = apply_rows(N, X, grad_loss, loss, ctx.dtype)
    return (dp, *(None,) * 6)


filtered_cosine_op.register_autograd(_backward, setup_context=_save)
