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

`rdm::filtered_cosine` gives the loss and N, which is of the smaller side; backward is
`rdm::apply_rows`, N X times what comes back, in p's dtype. Only dL/dp is ever as large as p. Under
data parallelism each rank passes its own rows and gets its own rows of the gradient of its own
mean. Where something is not finite the loss is NaN and the gradient zero.

The op is *defined* by its PyTorch body below. Triton registers itself as its CUDA kernel for
float32; float64 runs the definition on every device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.apply_rows import apply_rows
from rdm_kernels.product import product
from rdm_kernels.variant import Variant

EPS = 1e-8  # smallest norm, as in torch.nn.functional.cosine_similarity


def filtered_cosine(
    p: Tensor,
    norm: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    R: Tensor | None = None,
    X: Tensor | None = None,
    unit: Tensor | None = None,
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
        unit: [v], a factor of R; None is 1. So R may be a multiple of the identity.
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
        and (unit is None or unit.shape == (v,))
        and (k == D if X is None else X.shape == (v, k, D))
    )
    given = {"norm": norm, "alpha": alpha, "beta": beta, "gamma": gamma, "R": R}
    dtypes = {x.dtype for x in (*given.values(), unit) if x is not None}
    if not fits or dtypes not in ({torch.float32}, {torch.float64}):
        found = {
            name: x for name, x in {"p": p, **given, "X": X, "unit": unit}.items() if x is not None
        }
        raise ValueError(
            "filtered_cosine needs p [v, b, D], norm [v, b], alpha, beta, gamma [v, b, n], "
            "R [v, n, k], X [v, k, D], unit [v] or None for each of these three, all but p and X "
            "float32 or all float64; got "
            + ", ".join(f"{name} {x.dtype} {tuple(x.shape)}" for name, x in found.items())
        )
    fixed = [None if x is None else x.detach() for x in (*given.values(), X, unit)]
    with torch.autocast(p.device.type, enabled=False):
        loss, _ = filtered_cosine_op(p, *fixed)
    return loss


# ---- the op, defined by its body -------------------------------------------------------------


def define_filtered_cosine(
    p: Tensor,
    norm: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    R: Tensor | None,
    X: Tensor | None,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss [v] and N [v, b, k]. p is there for its gradient, X and unit are for backward."""
    square, dot = (alpha * beta).sum(dim=-1), (alpha * gamma).sum(dim=-1)
    y = square.clamp_min(0).sqrt()  # rounding may leave a square under zero
    a = -1 / (p.shape[1] * y.clamp_min(EPS) * norm.clamp_min(EPS))
    c = torch.where(y > EPS, -a * dot / square, 0)  # a clamped norm has no derivative

    finite = square.isfinite() & dot.isfinite() & norm.isfinite()
    loss = torch.where(finite, a * dot, torch.nan).sum(dim=-1)
    N = a[..., None] * gamma + c[..., None] * beta
    return loss, N if R is None else N @ R


filtered_cosine_op = torch.library.custom_op(
    "rdm::filtered_cosine", define_filtered_cosine, mutates_args=()
)


@filtered_cosine_op.register_fake
def _(
    p: Tensor,
    norm: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    R: Tensor | None,
    X: Tensor | None,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    k = alpha.shape[2] if R is None else R.shape[2]
    return alpha.new_empty(p.shape[0]), alpha.new_empty(p.shape[0], p.shape[1], k)


def _save(ctx, inputs, output):
    loss, N = output
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(N, *inputs[-2:], loss)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, _grad_N):
    dp = None
    if grad_loss is not None:
        N, X, unit, loss = ctx.saved_tensors
        scale = grad_loss if unit is None else grad_loss * unit
        with torch.autocast(N.device.type, enabled=False):
            dp = apply_rows(N, X, scale, loss, ctx.dtype)
    return (dp, *(None,) * 7)


filtered_cosine_op.register_autograd(_backward, setup_context=_save)


# ---- the Triton kernel -----------------------------------------------------------------------


@triton.jit(do_not_specialize=["b"])
def _rows_kernel(
    norm_ptr, alpha_ptr, beta_ptr, gamma_ptr, term_ptr, N_ptr,
    b, n, EPS: tl.constexpr, SAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one row: what it adds to the loss, and a gamma + c beta. SAME: beta is alpha."""
    row = tl.program_id(0).to(tl.int64)
    alpha_ptr += row * n
    gamma_ptr += row * n
    beta_ptr = alpha_ptr if SAME else beta_ptr + row * n
    lanes = tl.arange(0, BLOCK)
    squares, dots = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + lanes
        alpha = tl.load(alpha_ptr + at, mask=at < n, other=0.0)
        squares += alpha * (alpha if SAME else tl.load(beta_ptr + at, mask=at < n, other=0.0))
        dots += alpha * tl.load(gamma_ptr + at, mask=at < n, other=0.0)
    square, dot, norm = tl.sum(squares, axis=0), tl.sum(dots, axis=0), tl.load(norm_ptr + row)

    y = tl.sqrt(tl.maximum(square, 0.0))
    a = -1.0 / (b.to(tl.float32) * tl.maximum(y, EPS) * tl.maximum(norm, EPS))
    c = tl.where(y > EPS, -a * dot / square, 0.0)
    finite = (tl.abs(square) < float("inf")) & (tl.abs(dot) < float("inf"))
    finite = finite & (tl.abs(norm) < float("inf"))
    tl.store(term_ptr + row, tl.where(finite, a * dot, float("nan")))

    for start in range(0, n, BLOCK):  # from the cache
        at = start + lanes
        beta = tl.load(beta_ptr + at, mask=at < n, other=0.0)
        gamma = tl.load(gamma_ptr + at, mask=at < n, other=0.0)
        tl.store(N_ptr + row * n + at, a * gamma + c * beta, mask=at < n)


# ---- block sizes and launcher ------------------------------------------------------------------

ROWS = {"BLOCK": 1024, "num_warps": 4}


@filtered_cosine_op.register_kernel("cuda")
def filtered_cosine_triton(
    p: Tensor,
    norm: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    R: Tensor | None,
    X: Tensor | None,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if alpha.dtype == torch.float64:
        return define_filtered_cosine(p, norm, alpha, beta, gamma, R, X, unit)
    v, b, n = alpha.shape
    same = beta.data_ptr() == alpha.data_ptr() and beta.stride() == alpha.stride()
    norm, alpha, gamma = norm.contiguous(), alpha.contiguous(), gamma.contiguous()
    beta = alpha if same else beta.contiguous()
    term, N = alpha.new_empty(v, b), alpha.new_empty(v, b, n)
    _rows_kernel[(v * b,)](norm, alpha, beta, gamma, term, N, b, n, EPS=EPS, SAME=same, **ROWS)
    return term.sum(dim=-1), N if R is None else product(N, R)


def variants() -> list[Variant]:
    names = ("norm_ptr", "alpha_ptr", "beta_ptr", "gamma_ptr", "term_ptr", "N_ptr")
    types = dict.fromkeys(names, "*fp32") | {"b": "i32", "n": "i32"}
    return [
        Variant(
            _rows_kernel,
            types,
            {"EPS": EPS, "SAME": same, "BLOCK": ROWS["BLOCK"]},
            ROWS["num_warps"],
        )
        for same in (False, True)
    ]
