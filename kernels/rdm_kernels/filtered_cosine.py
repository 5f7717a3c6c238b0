"""Cosine loss of spectrally filtered online rows and its exact gradient, without forming the rows.

A filter W = X^T h X of a global batch X [B, D] acts on the online rows, y_i = p_i W, and carries no
gradient. The loss needs only two bilinear forms of each row, and its gradient one product, so
neither y nor dL/dy is formed:

    |y_i|^2 = <alpha_i, beta_i>     <y_i, t_i> = <alpha_i, gamma_i>     (t_i the target row)

    cos_i = <y_i, t_i> / (|y_i| |t_i|)        loss = -1/b sum_i cos_i
    dL/dy_i = a_i t_i + c_i y_i,   a_i = -1 / (b |y_i| |t_i|),   c_i = cos_i / (b |y_i|^2)
    dL/dp = dL/dy W = N X,   N = (diag(a) gamma + diag(c) beta) R

with the caller's X = U S V^T, G = X X^T and M = G h, restricted to the rows of this rank:

    eigenvectors, samples      alpha = beta = pV g   gamma = tV      R = diag(g) (U / S)^T   X
    eigenvectors, features     alpha = beta = pV g   gamma = tV      R = diag(g) V^T         -
    matrix function, samples   alpha = M, beta = MG  gamma = t X^T   R = h                   X
    matrix function, features  alpha = beta = p W    gamma = t       R = W                   -
    h = 1, samples             alpha = G, beta = GG  gamma = t X^T   R = 1                   X

`rdm::filtered_cosine` returns the loss and N, which is on the smaller side. Backward is
`rdm::apply_rows`: N X times the incoming gradient, in p's dtype. Only dL/dp is as large as p. In
data parallelism each rank passes its own rows and gets their gradient of its own mean. If something
is not finite, the loss is NaN and the gradient zero.

The op is defined by its PyTorch body; a Triton kernel replaces it on CUDA for float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rdm_kernels.apply_rows import apply_rows
from rdm_kernels.ops import cuda_launcher, define_op, describe
from rdm_kernels.product import product
from rdm_kernels.variant import FP32, Variant

EPS = 1e-8  # smallest norm, as in torch.nn.functional.cosine_similarity


def filtered_cosine(
    p: Tensor,
    norm: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    R: Tensor | None = None,
    X: Tensor | None = None,
    *,
    unit: Tensor | None = None,
) -> Tensor:
    """Mean negative cosine of each view between filtered online rows and target rows.

    Args:
        p: online rows of this rank, [v, b, D], any floating dtype. It takes the gradient; its
            values are not read.
        norm: length of each target row, [v, b].
        alpha, beta, gamma: [v, b, n]; <alpha_i, beta_i> is the squared length of filtered row i,
            and <alpha_i, gamma_i> its inner product with the target row. float32 or float64, the
            same as norm, R and unit. beta may be alpha itself.
        R: [v, n, k]; None for the identity.
        X: the global batch, [v, k, D], any floating dtype; None for the identity.
        unit: [v]; None for 1. R is divided by it, and without R so are alpha and beta, as then all
            three are multiples of it: the filter is X^T X / unit. 0 counts as 1.

    Returns:
        [v] in alpha's dtype, which is also that of the arithmetic, except for the product with X:
        float64 for float64 p, else float32. If a norm or bilinear form is not finite, the view's
        loss is NaN and its gradient zero, whatever X holds. Only p takes a gradient.

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
        raise ValueError(
            "filtered_cosine needs p [v, b, D], norm [v, b], alpha, beta, gamma [v, b, n], and "
            "R [v, n, k], X [v, k, D], unit [v] or None, all but p and X float32 or all float64, "
            f"got {describe(p=p, **given, X=X, unit=unit)}"
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
    """Loss [v] and N [v, b, k]. p serves for its gradient only, X for backward."""
    if unit is not None:
        unit = unit.where(unit != 0, 1)[:, None, None]
        alpha, beta = (alpha / unit, beta / unit) if R is None else (alpha, beta)
    square, dot = (alpha * beta).sum(dim=-1), (alpha * gamma).sum(dim=-1)
    y = square.clamp_min(0).sqrt()  # rounding can make a square negative
    a = -1 / (p.shape[1] * y.clamp_min(EPS) * norm.clamp_min(EPS))
    c = torch.where(y > EPS, -a * dot / square, 0)  # a clamped norm has no derivative

    finite = square.isfinite() & dot.isfinite() & norm.isfinite()
    finite = finite if unit is None else finite & unit[..., 0].isfinite()
    loss = torch.where(finite, a * dot, torch.nan).sum(dim=-1)
    N = a[..., None] * gamma + c[..., None] * beta
    N = N if unit is None else N / unit
    return loss, N.contiguous() if R is None else N @ R


filtered_cosine_op = define_op("filtered_cosine", define_filtered_cosine)


def _save(ctx, inputs, output):
    loss, N = output
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(N, inputs[6], loss)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, _grad_N):
    dp = None
    if grad_loss is not None:
        N, X, loss = ctx.saved_tensors
        with torch.autocast(N.device.type, enabled=False):
            dp = apply_rows(N, X, grad_loss, loss, ctx.dtype)
    return (dp, *(None,) * 7)


filtered_cosine_op.register_autograd(_backward, setup_context=_save)


# ---- the Triton kernel -----------------------------------------------------------------------


@triton.jit(do_not_specialize=["b"])
def _rows_kernel(
    norm_ptr, alpha_ptr, beta_ptr, gamma_ptr, unit_ptr, term_ptr, N_ptr,
    b, n, EPS: tl.constexpr, SAME: tl.constexpr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program: its term of the loss and its row of N before R.

    SAME: beta is alpha. DIVIDE: the unit, if there is one, also divides alpha and beta.
    """
    row = tl.program_id(0).to(tl.int64)
    alpha_ptr += row * n
    gamma_ptr += row * n
    beta_ptr = alpha_ptr if SAME else beta_ptr + row * n
    unit = 1.0
    if unit_ptr is not None:
        unit = tl.load(unit_ptr + row // b)
        unit = tl.where(unit == 0.0, 1.0, unit)
    factor = 1.0 / unit if DIVIDE else 1.0
    lanes = tl.arange(0, BLOCK)
    squares, dots = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + lanes
        alpha = factor * tl.load(alpha_ptr + at, mask=at < n, other=0.0)
        beta = alpha
        if not SAME:
            beta = factor * tl.load(beta_ptr + at, mask=at < n, other=0.0)
        squares += alpha * beta
        dots += alpha * tl.load(gamma_ptr + at, mask=at < n, other=0.0)
    square, dot, norm = tl.sum(squares, axis=0), tl.sum(dots, axis=0), tl.load(norm_ptr + row)

    y = tl.sqrt(tl.maximum(square, 0.0))
    a = -1.0 / (b.to(tl.float32) * tl.maximum(y, EPS) * tl.maximum(norm, EPS))
    c = tl.where(y > EPS, -a * dot / square, 0.0)
    finite = (tl.abs(square) < float("inf")) & (tl.abs(dot) < float("inf"))
    finite = finite & (tl.abs(norm) < float("inf")) & (tl.abs(unit) < float("inf"))
    tl.store(term_ptr + row, tl.where(finite, a * dot, float("nan")))

    for start in range(0, n, BLOCK):  # from the cache
        at = start + lanes
        beta = factor * tl.load(beta_ptr + at, mask=at < n, other=0.0)
        gamma = tl.load(gamma_ptr + at, mask=at < n, other=0.0)
        tl.store(N_ptr + row * n + at, (a * gamma + c * beta) / unit, mask=at < n)


# ---- block sizes and launcher ------------------------------------------------------------------

ROWS = {"BLOCK": 1024, "num_warps": 4}


@cuda_launcher(filtered_cosine_op)
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
    unit = None if unit is None else unit.contiguous()
    term, N = alpha.new_empty(v, b), alpha.new_empty(v, b, n)
    _rows_kernel[(v * b,)](
        norm, alpha, beta, gamma, unit, term, N, b, n,
        EPS=EPS, SAME=same, DIVIDE=R is None and unit is not None, **ROWS,
    )  # fmt: skip
    return term.sum(dim=-1), N if R is None else product(N, R)


def variants() -> list[Variant]:
    """With and without a beta of its own, and a unit."""
    names = ("norm_ptr", "alpha_ptr", "beta_ptr", "gamma_ptr", "term_ptr", "N_ptr")
    types = dict.fromkeys(names, FP32) | {"b": "i32", "n": "i32"}
    found = []
    for same in (False, True):
        launch = ROWS | {"EPS": EPS, "SAME": same}
        found.append(Variant(_rows_kernel, types, launch | {"DIVIDE": False, "unit_ptr": None}))
        for divide in (False, True):
            scaled = types | {"unit_ptr": FP32}
            found.append(Variant(_rows_kernel, scaled, launch | {"DIVIDE": divide}))
    return found
