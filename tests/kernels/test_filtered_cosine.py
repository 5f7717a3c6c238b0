"""rdm_kernels.filtered_cosine against autograd through the paper's formula, in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels import filtered_cosine
from rdm_kernels.apply_rows import apply_rows_triton
from rdm_kernels.filtered_cosine import (
    EPS,
    ROWS,
    define_filtered_cosine,
    filtered_cosine_op,
    filtered_cosine_triton,
)
from tests.kernels.common import DEVICE, Body, U, randn

S_MAX = 20  # largest singular value of the batches drawn here; the smallest is 1
EXACT = 1e-11  # float64 carries 1e-16, of numbers up to S_MAX^2, and as much more by the condition
ROUNDED = 5e-6  # float32 carries 6e-8, and so much more by sums of up to S_MAX times the result

NAMES = ("vectors-samples", "vectors-features", "matrix-samples", "matrix-features", "power")
ENGINES = pytest.mark.parametrize("engine", NAMES)
BODIES = pytest.mark.parametrize(
    "body", [filtered_cosine_op, filtered_cosine_triton], ids=["definition", "kernel"]
)
BAD = pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
seeds = st.integers(0, 2**31)


@dataclass(frozen=True)
class Case:
    """A batch X = U diag(s) V^T, the response g on s, and targets t of b rows, all in float64."""

    U: Tensor  # [v, B, n]
    s: Tensor  # [v, n]
    V: Tensor  # [v, D, n]
    g: Tensor  # [v, n]
    t: Tensor  # [v, b, D]

    @property
    def X(self) -> Tensor:
        return (self.U * self.s[:, None]) @ self.V.mT

    @property
    def p(self) -> Tensor:
        """This rank's rows: the last of the batch."""
        return self.X[:, -self.t.shape[1] :]

    def W(self, engine: str) -> Tensor:
        """The filter V diag(g) V^T, or X^T X = V diag(s^2) V^T."""
        response = self.s.square() if engine == "power" else self.g
        return (self.V * response[:, None]) @ self.V.mT

    def arguments(self, engine: str) -> list[Tensor | None]:
        """The arguments that an engine passes: norm, alpha, beta, gamma, R, X."""
        b, X, t, norm = self.t.shape[1], self.X, self.t, self.t.norm(dim=-1)
        U, s, V, g = self.U, self.s[:, None], self.V, self.g[:, None]
        if engine == "vectors-samples":
            alpha = U[:, -b:] * s * g
            return [norm, alpha, alpha, t @ (X.mT @ (U / s)), ((U / s) * g).mT, X]
        if engine == "vectors-features":
            alpha = (self.p @ V) * g
            return [norm, alpha, alpha, t @ V, (V * g).mT, None]
        G = X @ X.mT
        if engine == "matrix-samples":
            M, h = (U * g) @ U.mT, (U * (g / s.square())) @ U.mT
            return [norm, M[:, -b:], (M @ G)[:, -b:], t @ X.mT, h, X]
        if engine == "matrix-features":
            W = self.W(engine)
            return [norm, self.p @ W, self.p @ W, t, W, None]
        return [norm, G[:, -b:], (G @ G)[:, -b:], t @ X.mT, None, X]

    def loss(self, engine: str, p: Tensor) -> Tensor:
        return filtered_cosine(p, *self.arguments(engine))

    def literal(self, engine: str, p: Tensor) -> Tensor:
        """-mean cos(p W, t); autograd does the rest."""
        return -F.cosine_similarity(p @ self.W(engine), self.t, dim=-1, eps=EPS).mean(dim=-1)

    def unit(self, engine: str) -> Tensor:
        """The gradient's unit: 1 / |p W| times W."""
        W = self.W(engine)
        return torch.linalg.matrix_norm(W, 2).max() / (self.p @ W).norm(dim=-1).min()


def case(v: int, b: int, B: int, D: int, seed: int = 0) -> Case:
    """b of the batch's B rows (all, if there are fewer) are this rank's."""
    n, wide = min(B, D), torch.float64
    s = torch.linspace(1, S_MAX, n, dtype=wide, device=DEVICE).repeat(v, 1)
    U = torch.linalg.qr(randn(v, B, n, seed=seed, dtype=wide))[0]
    V = torch.linalg.qr(randn(v, D, n, seed=seed + 1, dtype=wide))[0]
    g = randn(v, n, seed=seed + 2, dtype=wide)  # of either sign, like log s
    return Case(U, s, V, g, randn(v, min(b, B), D, seed=seed + 3, dtype=wide))


def both(drawn: Case, engine: str, p: Tensor | None = None) -> tuple[Tensor, ...]:
    """Loss and gradient of the op, then of the literal formula, with a different weight a view."""
    p = drawn.p if p is None else p
    weight = torch.arange(1, len(p) + 1, dtype=torch.float64, device=DEVICE)
    found: list[Tensor] = []
    for leaf, function in (
        (p.clone().requires_grad_(), drawn.loss),
        (drawn.p.clone().requires_grad_(), drawn.literal),
    ):
        loss = function(engine, leaf)
        (loss * weight).sum().backward()
        assert leaf.grad is not None
        found += [loss.detach(), leaf.grad]
    return tuple(found)


@ENGINES
@settings(max_examples=25)
@given(
    v=st.integers(1, 3),
    b=st.integers(1, 9),
    B=st.sampled_from([1, 2, 3, 7, 16, 33]),
    D=st.sampled_from([1, 2, 5, 16, 31, 64]),
    seed=seeds,
)
def test_it_equals_autograd(v: int, b: int, B: int, D: int, seed: int, engine: str) -> None:
    drawn = case(v, b, B, D, seed)
    loss, grad, expected_loss, expected_grad = both(drawn, engine)
    torch.testing.assert_close(loss, expected_loss, atol=EXACT, rtol=0)
    unit = 1 + drawn.unit(engine)
    torch.testing.assert_close(grad / unit, expected_grad / unit, atol=EXACT, rtol=0)


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_rows_round_only_the_product_and_gradient(dtype: torch.dtype, engine: str) -> None:
    """The values of p are not read, and those of X are multiplied as they are, by N in full."""
    drawn = case(2, 6, 16, 40)
    *rest, X = drawn.arguments(engine)
    found = []
    for rows, batch in ((dtype, dtype), (torch.float64, torch.float64)):
        p = drawn.p.to(rows).requires_grad_()
        loss = filtered_cosine(p, *rest, None if X is None else X.to(dtype).to(batch))
        found += [loss, *torch.autograd.grad(loss.sum(), p)]
    loss, grad, exact_loss, exact = found
    assert torch.equal(loss, exact_loss) and loss.dtype == torch.float64 and grad.dtype == dtype
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert (grad.double() - exact).norm() <= (ROUNDED + rounding) * exact.norm()


@pytest.mark.parametrize("engine", NAMES[:-1])
def test_directions_that_are_cut_off_get_no_gradient(engine: str) -> None:
    """View 1 is cut off as a whole."""
    drawn = case(2, 5, 12, 20)
    drawn.g[:, 3] = drawn.g[1] = 0
    loss, grad, expected_loss, expected_grad = both(drawn, engine)
    torch.testing.assert_close(loss, expected_loss, atol=EXACT, rtol=0)
    torch.testing.assert_close(grad, expected_grad, atol=EXACT, rtol=0)
    assert ((grad @ drawn.V[:, :, 3:4]).abs() <= 1e-14).all()
    assert loss[1] == 0 and (grad[1] == 0).all()


@ENGINES
def test_a_row_of_zeros_adds_nothing_to_the_loss(engine: str) -> None:
    drawn = case(1, 4, 12, 20)
    drawn.U[:, -4] = 0  # the first of this rank's rows; U is then not orthonormal, X as it is
    drawn.t[:, 1] = 0
    arguments = drawn.arguments(engine)
    p = drawn.p.clone().requires_grad_()
    loss = filtered_cosine(p, *arguments)
    loss.sum().backward()
    assert p.grad is not None and p.grad.isfinite().all()
    assert (p.grad[:, 1] == 0).all()
    norm, alpha, beta, gamma, R, X = arguments
    rest = [x[:, 2:] for x in (norm, alpha, beta, gamma) if x is not None]
    half = filtered_cosine(p[:, 2:], *rest, R, X) / 2
    torch.testing.assert_close(loss, half, atol=EXACT, rtol=0)


@BODIES
def test_a_square_that_rounding_made_negative_is_a_length_of_zero(body: Body) -> None:
    alpha, gamma = torch.ones(1, 1, 2, device=DEVICE), torch.zeros(1, 1, 2, device=DEVICE)
    beta = torch.tensor([[[1.0, -1 - 1e-6]]], device=DEVICE)
    loss, N = body(alpha, alpha.new_ones(1, 1), alpha, beta, gamma, None, None)
    assert loss.item() == 0 and (N == 0).all()


@ENGINES
@pytest.mark.parametrize("where", ["U", "s", "V", "g", "t"])
@BAD
def test_a_value_that_is_not_finite_spoils_its_view(where: str, bad: float, engine: str) -> None:
    if engine == "power" and where == "g":
        pytest.skip("h = 1 has no response")
    good = case(2, 4, 12, 20)
    drawn = replace(good, **{where: getattr(good, where).clone()})
    getattr(drawn, where)[1, 2 if where != "U" else -2] = bad  # of a row that is this rank's
    loss, grad, *_ = both(drawn, engine)
    expected_loss, expected_grad, *_ = both(good, engine)
    assert loss[1].isnan() and (grad[1] == 0).all()
    assert loss[0] == expected_loss[0]
    torch.testing.assert_close(grad[0], expected_grad[0], atol=0, rtol=1e-12)


@BODIES
@pytest.mark.parametrize("where", ["norm", "alpha", "beta", "gamma"])
@BAD
def test_no_infinite_argument_hides_in_a_quotient(where: str, bad: float, body: Body) -> None:
    """1 / inf is 0, so an infinite length alone looks like a cosine of 0."""
    tensors = dict(zip(("norm", "alpha", "beta", "gamma"), bilinear(2, 3, 8), strict=True))
    tensors[where][1, 2] = bad
    loss, _ = body(torch.ones(2, 3, 8, device=DEVICE), *tensors.values(), None, None)
    assert loss[0].isfinite() and loss[1].isnan()


@ENGINES
def test_only_the_online_rows_take_a_gradient(engine: str) -> None:
    drawn = case(2, 4, 12, 20)
    given = [drawn.p, *drawn.arguments(engine)]
    leaves = [None if x is None else x.clone().requires_grad_() for x in given]
    filtered_cosine(*leaves).sum().backward()
    assert leaves[0] is not None and leaves[0].grad is not None
    assert all(leaf is None or leaf.grad is None for leaf in leaves[1:])


# ---- in float32, by the definition and by the kernels ----------------------------------------


def bilinear(v: int, b: int, n: int, seed: int = 0) -> list[Tensor]:
    """norm, alpha, beta, gamma in float32; |y|^2 is not small against its terms."""
    alpha, noise, gamma = randn(3, v, b, n, seed=seed)
    norm = gamma.norm(dim=-1) * (1.5 + randn(v, b, seed=seed).tanh() / 2)
    return [norm, alpha, alpha * (0.5 + noise.abs()), gamma]


def coefficients(norm: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> dict[str, Tensor]:
    """Each row's term of the loss and of N in float64, and their errors allowed in float32.

    A sum of n products is within (n + 1) u of the sum of their magnitudes. Square roots and
    quotients are within 2 u each, and there are few: 12 u in all.
    """
    norm, alpha, beta, gamma = (x.double() for x in (norm, alpha, beta, gamma))
    b, n = alpha.shape[1:]
    square, dot = (alpha * beta).sum(-1), (alpha * gamma).sum(-1)
    a = -1 / (b * square.sqrt() * norm)
    c = -a * dot / square
    in_square = (n + 1) * U * (alpha * beta).abs().sum(-1) / square
    in_dot = (n + 1) * U * (alpha * gamma).abs().sum(-1)
    in_a = a.abs() * (in_square + 12 * U)
    in_c = c.abs() * (2 * in_square + 12 * U) + a.abs() * in_dot / square
    return {
        "term": a * dot,
        "in_term": in_a * dot.abs() + a.abs() * in_dot,
        "N": a[..., None] * gamma + c[..., None] * beta,
        "in_N": (in_a + 3 * U * a.abs())[..., None] * gamma.abs()
        + (in_c + 3 * U * c.abs())[..., None] * beta.abs(),
    }


def check(body: Body, forms: list[Tensor], R: Tensor | None) -> None:
    """Loss and N of a body against float64, within the bound."""
    v, b, n = forms[1].shape
    k = n if R is None else R.shape[2]
    loss, N = body(forms[1].new_zeros(v, b, k), *forms, R, None)
    expected = coefficients(*forms)
    in_loss = expected["in_term"].sum(-1) + (b + 1) * U * expected["term"].abs().sum(-1)
    assert loss.dtype == N.dtype == torch.float32
    assert ((loss - expected["term"].sum(-1)).abs() <= in_loss).all()
    wanted, allowed = expected["N"], expected["in_N"]
    if R is not None:
        R = R.double()
        allowed = allowed @ R.abs() + (n + 14) * U * (wanted.abs() + allowed) @ R.abs()
        wanted = wanted @ R
    assert ((N - wanted).abs() <= allowed).all()


@BODIES
@settings(max_examples=25)
@given(
    v=st.integers(1, 3),
    b=st.sampled_from([1, 2, 7]),
    n=st.sampled_from([1, 2, 15, 16, 33, 100]),
    k=st.sampled_from([None, 1, 5, 16]),
    same=st.booleans(),
    seed=seeds,
)
def test_float32_is_within_its_bound(
    v: int, b: int, n: int, k: int | None, same: bool, seed: int, body: Body
) -> None:
    forms = bilinear(v, b, n, seed)
    forms[2] = forms[1] if same else forms[2]
    check(body, forms, None if k is None else randn(v, n, k, seed=seed))


@BODIES
@pytest.mark.parametrize("same", [True, False], ids=["beta-is-alpha", "beta"])
def test_rows_of_several_blocks_are_read_to_their_end(same: bool, body: Body) -> None:
    norm, alpha, beta, gamma = bilinear(2, 3, 2 * ROWS["BLOCK"] + 5)
    check(body, [norm, alpha, alpha if same else beta, gamma], None)


def test_rows_of_this_rank_may_be_a_slice_of_all_and_beta_may_be_alpha() -> None:
    norm, alpha, _, gamma = (x[:, 3:7] for x in bilinear(2, 9, 20))
    check(filtered_cosine_triton, [norm, alpha, alpha, gamma], randn(2, 20, 6))


def test_beta_with_the_data_but_not_the_strides_of_alpha_is_not_alpha() -> None:
    norm, alpha, _, gamma = bilinear(1, 4, 4)
    square = alpha + 5 * torch.eye(4, device=DEVICE)
    check(filtered_cosine_triton, [norm, square, square.mT, gamma], None)


@ENGINES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_kernels_together_give_the_literal_gradient(dtype: torch.dtype, engine: str) -> None:
    """As in a training step: forms of the batch in float32, X in p's dtype."""
    drawn = case(2, 6, 16, 40)
    *_, expected_loss, expected_grad = both(drawn, engine)
    arguments = [None if x is None else x.float() for x in drawn.arguments(engine)]
    X = None if arguments[-1] is None else arguments[-1].to(dtype)
    p = drawn.p.to(dtype)
    loss, N = filtered_cosine_triton(p, *arguments[:-1], X)
    weight = torch.arange(1.0, 3.0, device=DEVICE)
    grad = apply_rows_triton(N, X, weight, loss, dtype)
    torch.testing.assert_close(loss.double(), expected_loss, atol=1e-5, rtol=0)
    # X, and then the gradient, are rounded to p's dtype; the condition of X is S_MAX
    rounding = 0 if dtype == torch.float32 else 2 * S_MAX * torch.finfo(dtype).eps
    error = (grad.double() - expected_grad).norm() / expected_grad.norm()
    assert error <= S_MAX**2 * ROUNDED + rounding


@BODIES
@pytest.mark.parametrize("same", [True, False], ids=["beta-is-alpha", "beta"])
@pytest.mark.parametrize("with_R", [True, False], ids=["R", "identity"])
def test_a_unit_divides_the_filter(with_R: bool, same: bool, body: Body) -> None:
    """The unit of view 1 is 0, which counts as 1."""
    norm, alpha, beta, gamma = bilinear(3, 2, 8)
    beta = alpha if same else beta
    R = randn(3, 8, 5) if with_R else torch.eye(8, device=DEVICE).expand(3, -1, -1)
    unit, divisor = alpha.new_tensor([3, 0, 0.2]), alpha.new_tensor([[[3]], [[1]], [[0.2]]])
    found = body(alpha, norm, alpha, beta, gamma, R if with_R else None, None, unit)
    scale = 1 if with_R else divisor
    expected = body(alpha, norm, alpha / scale, beta / scale, gamma, R / divisor, None)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@BODIES
@BAD
def test_a_unit_that_is_not_finite_spoils_its_view(bad: float, body: Body) -> None:
    for R in (None, torch.ones(2, 8, 5, device=DEVICE)):
        forms = bilinear(2, 3, 8)
        loss, _ = body(forms[1], *forms, R, None, forms[1].new_tensor([2, bad]))
        assert loss[0].isfinite() and loss[1].isnan()


def test_float64_runs_the_definition_on_every_device() -> None:
    forms = [x.double() for x in bilinear(2, 3, 8)]
    p = forms[1]
    found = filtered_cosine_triton(p, *forms, None, None)
    assert all(map(torch.equal, found, define_filtered_cosine(p, *forms, None, None)))
