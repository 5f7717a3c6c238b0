"""rdm_kernels.filtered_cosine against autograd through the paper's formula, in float64."""

from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels import filtered_cosine
from rdm_kernels.filtered_cosine import EPS, filtered_cosine_op

SIDES = pytest.mark.parametrize("samples", [True, False], ids=["samples", "features"])
BRANCHES = pytest.mark.parametrize("online", [True, False], ids=["online", "target"])
EXACT = 1e-11  # float64 carries 1e-16, and the conditions of the bases drawn here are under 100
ROUNDED = 5e-6  # float32 carries 6e-8, and so much more by a basis of condition up to 100


@dataclass(frozen=True)
class Case:
    """A filter with basis V and response g, and online and target rows before it; all float64."""

    p: Tensor  # [v, b, D]
    z: Tensor  # [v, b, D]
    g: Tensor  # [v, n]
    V: Tensor  # [v, D, n], orthonormal columns
    basis: Tensor  # V, or U / S
    X: Tensor | None

    def loss(self, p: Tensor, online: bool) -> Tensor:
        """The op, fed by its contract. It may be given rows in other dtypes than float64."""
        unfiltered = self.z if online else p.detach().double()
        return filtered_cosine(
            p,
            unfiltered.norm(dim=-1),
            p.detach().double() @ self.V,
            self.z @ self.V,
            self.g,
            self.basis,
            self.X,
            online=online,
        )

    def literal(self, p: Tensor, online: bool) -> Tensor:
        """-mean cos(p W, z) or -mean cos(p, z W), W = V diag(g) V^T; autograd does the rest."""
        W = (self.V * self.g[:, None, :]) @ self.V.mT
        y, t = (p @ W, self.z) if online else (p, self.z @ W)
        return -F.cosine_similarity(y, t, dim=-1, eps=EPS).mean(dim=-1)


def case(v: int, b: int, B: int, D: int, samples: bool, seed: int = 0) -> Case:
    """A global batch X of B rows, and b rows of each branch that need not be among them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n = min(B, D)
    U, _ = torch.linalg.qr(randn(v, B, n))
    V, _ = torch.linalg.qr(randn(v, D, n))
    s = torch.linspace(1, 20, n, dtype=torch.float64).expand(v, n)
    g = randn(v, n)  # of either sign, like log s
    if samples:
        return Case(randn(v, b, D), randn(v, b, D), g, V, U / s[:, None], U * s[:, None] @ V.mT)
    return Case(randn(v, b, D), randn(v, b, D), g, V, V, None)


def both(drawn: Case, online: bool, p: Tensor | None = None) -> tuple[Tensor, ...]:
    """Loss and gradient of the op, then of the literal formula, with a different weight a view."""
    p = drawn.p if p is None else p
    weight = torch.arange(1, len(p) + 1, dtype=torch.float64)
    found: list[Tensor] = []
    for leaf, function in (
        (p.clone().requires_grad_(), drawn.loss),
        (p.double().clone().requires_grad_(), drawn.literal),
    ):
        loss = function(leaf, online)
        (loss * weight).sum().backward()
        assert leaf.grad is not None
        found += [loss.detach(), leaf.grad]
    return tuple(found)


@SIDES
@BRANCHES
@settings(max_examples=60)
@given(
    v=st.integers(1, 3),
    b=st.integers(1, 9),
    B=st.sampled_from([1, 2, 3, 7, 16, 33]),
    D=st.sampled_from([1, 2, 5, 16, 31, 64]),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradient_equal_autograd_of_the_literal_formula(
    v: int, b: int, B: int, D: int, seed: int, samples: bool, online: bool
) -> None:
    """A gradient's own unit is 1 / |p| of an unfiltered row, and 1 / |p W| times W of a filtered
    one; the literal one's largest element is as good and simpler."""
    drawn = case(v, b, B, D, samples, seed)
    loss, grad, expected_loss, expected_grad = both(drawn, online)
    torch.testing.assert_close(loss, expected_loss, atol=EXACT, rtol=0)
    unit = 1 + expected_grad.abs().max() + 1 / drawn.p.norm(dim=-1).min()
    if online:
        unit = unit * (
            drawn.g.abs().max() / (drawn.p @ drawn.V * drawn.g[:, None]).norm(dim=-1).min()
        )
    torch.testing.assert_close(grad / unit, expected_grad / unit, atol=EXACT, rtol=0)


@SIDES
@BRANCHES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_rows_cost_the_rounding_of_the_last_product_and_of_the_result(
    dtype: torch.dtype, samples: bool, online: bool
) -> None:
    drawn = case(2, 6, 16, 40, samples)
    p = drawn.p.to(dtype)
    loss, grad, expected_loss, expected_grad = both(drawn, online, p)
    torch.testing.assert_close(loss, expected_loss, atol=1e-12, rtol=0)
    assert loss.dtype == torch.float64 and grad.dtype == dtype
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    error = (grad.double() - expected_grad).norm() / expected_grad.norm()
    assert error <= ROUNDED + rounding


@SIDES
@BRANCHES
def test_a_direction_that_is_cut_off_takes_no_part(samples: bool, online: bool) -> None:
    """g = 0: the coordinates along it may be anything."""
    drawn = case(2, 5, 12, 20, samples)
    drawn.g[:, 3] = 0
    loss, grad, expected_loss, expected_grad = both(drawn, online)
    torch.testing.assert_close(loss, expected_loss, atol=EXACT, rtol=0)
    torch.testing.assert_close(grad, expected_grad, atol=EXACT, rtol=0)
    other = replace(drawn, V=drawn.V.clone())
    other.V[:, :, 3] *= 7  # only in the coordinates: the op has its own basis
    torch.testing.assert_close(other.loss(drawn.p, online), loss, atol=EXACT, rtol=0)


@SIDES
@BRANCHES
def test_a_row_of_zeros_adds_nothing_to_the_loss_and_its_gradient_is_finite(
    samples: bool, online: bool
) -> None:
    drawn = case(1, 4, 12, 20, samples)
    drawn.p[:, 0] = 0
    drawn.z[:, 1] = 0
    loss, grad, expected_loss, _ = both(drawn, online)
    torch.testing.assert_close(loss, expected_loss, atol=EXACT, rtol=0)
    assert grad.isfinite().all()
    assert (grad[:, 1] == 0).all()  # every direction is as far from a zero target
    rest = Case(*(getattr(drawn, f.name) for f in fields(drawn)))
    rest = replace(rest, p=drawn.p[:, 2:], z=drawn.z[:, 2:])
    torch.testing.assert_close(loss, rest.loss(rest.p, online) / 2, atol=EXACT, rtol=0)


@SIDES
@BRANCHES
def test_a_filter_that_lets_nothing_through_gives_zero_and_not_nan(
    samples: bool, online: bool
) -> None:
    drawn = case(2, 4, 12, 20, samples)
    drawn.g.zero_()
    loss, grad, *_ = both(drawn, online)
    assert (loss == 0).all() and (grad == 0).all()


@SIDES
@BRANCHES
@pytest.mark.parametrize("where", ["p", "g", "z"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_makes_its_view_s_loss_nan_and_gradient_zero(
    where: str, bad: float, samples: bool, online: bool
) -> None:
    good = case(2, 4, 12, 20, samples)
    drawn = Case(*(None if x is None else x.clone() for x in vars(good).values()))  # type: ignore[arg-type]
    getattr(drawn, where)[1, 2] = bad
    loss, grad, *_ = both(drawn, online)
    expected_loss, expected_grad, *_ = both(good, online)
    assert not loss[1].isfinite() and (grad[1] == 0).all()
    assert loss[0] == expected_loss[0]
    torch.testing.assert_close(grad[0], expected_grad[0], atol=0, rtol=1e-12)


@SIDES
@BRANCHES
@settings(max_examples=20)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**31))
def test_the_scale_of_rows_and_response_is_ignored_and_the_gradient_falls_with_that_of_the_rows(
    scale: float, seed: int, samples: bool, online: bool
) -> None:
    drawn = case(1, 4, 12, 20, samples, seed)
    loss, grad, *_ = both(drawn, online)
    scaled = replace(drawn, p=drawn.p * scale, z=drawn.z / scale, g=drawn.g * scale)
    scaled_loss, scaled_grad, *_ = both(scaled, online)
    torch.testing.assert_close(scaled_loss, loss, atol=1e-9, rtol=0)
    torch.testing.assert_close(
        scaled_grad * scale, grad, atol=1e-9 * float(grad.abs().max()), rtol=0
    )


@SIDES
@BRANCHES
def test_backward_multiplies_the_gradient_by_what_comes_back(samples: bool, online: bool) -> None:
    drawn = case(3, 4, 12, 20, samples)
    grads = []
    for weight in (torch.ones(3), torch.tensor([2.0, 0.0, -3.0])):
        p = drawn.p.clone().requires_grad_()
        drawn.loss(p, online).backward(weight.double())
        assert p.grad is not None
        grads.append(p.grad)
    expected = torch.tensor([2.0, 0.0, -3.0])[:, None, None] * grads[0]
    torch.testing.assert_close(grads[1], expected, atol=0, rtol=1e-15)


@SIDES
@BRANCHES
def test_only_the_online_rows_take_a_gradient(samples: bool, online: bool) -> None:
    drawn = case(2, 4, 12, 20, samples)
    tensors = [drawn.p, drawn.z.norm(dim=-1), drawn.p @ drawn.V, drawn.z @ drawn.V, drawn.g]
    leaves = [x.clone().requires_grad_() for x in (*tensors, drawn.basis)]
    X = None if drawn.X is None else drawn.X.clone().requires_grad_()
    filtered_cosine(*leaves, X, online=online).sum().backward()
    assert leaves[0].grad is not None
    assert all(leaf.grad is None for leaf in leaves[1:]) and (X is None or X.grad is None)


@SIDES
@BRANCHES
def test_the_op_is_registered_correctly(samples: bool, online: bool) -> None:
    drawn = case(2, 4, 12, 20, samples)
    X = drawn.g.new_zeros(0) if drawn.X is None else drawn.X.float()
    p = drawn.p.to(torch.bfloat16).requires_grad_()
    norm = drawn.z.norm(dim=-1)
    args = (p, norm, drawn.p @ drawn.V, drawn.z @ drawn.V, drawn.g, drawn.basis, X, online)
    torch.library.opcheck(filtered_cosine_op, args)
