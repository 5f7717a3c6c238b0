"""rdm_kernels.prototype_loss and centered_softmax against autograd in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels import centered_softmax, prototype_logits, prototype_loss
from rdm_kernels.prototype_loss import (
    centered_softmax_op,
    centered_softmax_triton,
    prototype_loss_backward,
    prototype_loss_backward_triton,
    prototype_loss_op,
    prototype_loss_triton,
)
from tests.kernels.common import DEVICE, Body, U, randn

BODIES = pytest.mark.parametrize(
    ("forward", "backward"),
    [(prototype_loss_op, prototype_loss_backward),
     (prototype_loss_triton, prototype_loss_backward_triton)],
    ids=["definition", "kernel"],
)  # fmt: skip
SOFTMAX = pytest.mark.parametrize(
    "softmax", [centered_softmax_op, centered_softmax_triton], ids=["definition", "kernel"]
)


def case(v: int, t: int, b: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits in [-1, 1], and targets at a temperature of 0.04."""
    logits, scores = randn(v, b, K, seed=seed).tanh(), randn(t, b, K, seed=seed + 1).tanh()
    return logits, (scores / 0.04).softmax(dim=-1)


def pair_by_pair(logits: Tensor, q: Tensor, temperature: float) -> Tensor:
    log_p = (logits / temperature).log_softmax(dim=-1)
    t = len(q)
    return torch.stack(
        [
            sum(-(q[i] * log_p[s]).sum(dim=-1).mean() for i in ([s] if s < t else range(t)))
            for s in range(len(logits))
        ]
    )


def check(logits: Tensor, q: Tensor, temperature: float, forward: Body, backward: Body) -> None:
    """The loss within 1e-6 of its size, and a row's gradient within 1e-6 of |Q|_1 / tau."""
    weight = torch.linspace(-2, 3, len(logits), device=DEVICE)
    loss, *rows = forward(logits, q, temperature)
    d = backward(weight, logits, q, *rows, temperature)
    wide = logits.double().requires_grad_()
    expected = pair_by_pair(wide, q.double(), temperature)
    (weight * expected).sum().backward()
    assert loss.dtype == d.dtype == torch.float32
    x = 2 / temperature + logits.shape[-1]
    torch.testing.assert_close(loss.double(), expected.detach(), atol=4 * x * U, rtol=2e-6)
    mass = rows[2][..., None] * weight.abs()[:, None, None] / logits.shape[1] / temperature
    assert ((d - wide.grad).abs() <= mass * (4 * x * U)).all()


@BODIES
@settings(max_examples=10)
@given(
    views=st.sampled_from([(1, 1), (2, 2), (2, 1), (5, 2), (4, 3)]),
    b=st.integers(1, 2),
    K=st.sampled_from([1, 2, 1023, 1025]),
    temperature=st.sampled_from([0.04, 0.1, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradient_equal_float64_pair_by_pair(
    views: tuple[int, int], b: int, K: int, temperature: float, seed: int, forward: Body,
    backward: Body,
) -> None:  # fmt: skip
    check(*case(*views, b, K, seed), temperature, forward, backward)


@BODIES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["logits", "q"])
def test_a_row_that_is_not_finite_gets_no_gradient(
    which: int, bad: float, forward: Body, backward: Body
) -> None:
    given = case(4, 2, 3, 40)
    weight = torch.ones(4, device=DEVICE)
    good = backward(weight, *given, *forward(*given, 0.1)[1:], 0.1)
    given[which][1, 2, 7] = bad  # row 2 of view 1, or of a target of views 1 to 3
    loss, *rows = forward(*given, 0.1)
    d = backward(weight, *given, *rows, 0.1)
    hit = [1] if which == 0 else [1, 2, 3]
    assert loss.isfinite().tolist() == [s not in hit for s in range(4)]
    for s in range(4):
        assert torch.equal(d[s, :2], good[s, :2])
        assert (d[s, 2] == 0).all() if s in hit else torch.equal(d[s, 2], good[s, 2])


def test_only_logits_take_a_gradient_and_each_view_has_its_own_weight() -> None:
    logits, q = (x.requires_grad_() for x in case(3, 2, 4, 50))
    loss = prototype_loss(logits, q, 0.1)
    d, of_targets = torch.autograd.grad(loss[2], (logits, q), allow_unused=True)
    assert of_targets is None and (d[:2] == 0).all() and d[2].any()


@SOFTMAX
@settings(max_examples=10)
@given(
    v=st.integers(1, 2),
    b=st.integers(1, 2),
    K=st.sampled_from([1, 2, 1023, 1025]),
    temperature=st.sampled_from([0.04, 0.1, 1.0]),
    center=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_softmax_is_that_of_float64(
    v: int, b: int, K: int, temperature: float, center: bool, seed: int, softmax: Body
) -> None:
    scores = randn(v, b, K, seed=seed).tanh()
    c = randn(K, seed=seed + 1).tanh() if center else None
    tau = torch.tensor(temperature, device=DEVICE)
    found = softmax(scores, c, tau)
    shifted = scores.double() - (0 if c is None else c.double())
    expected = (shifted / tau.double()).softmax(dim=-1)
    bound = (16 / temperature + K + 8) * U
    assert found.dtype == torch.float32
    assert ((found - expected).abs() <= bound * expected + 1e-37).all()


def test_float64_is_not_narrowed() -> None:
    logits, q = (x.double() for x in case(3, 2, 4, 50))
    expected = pair_by_pair(logits, q, 0.1)
    for body in (prototype_loss_op, prototype_loss_triton):
        loss, *rows = body(logits, q, 0.1)
        torch.testing.assert_close(loss, expected, atol=1e-13, rtol=0)
    grad = torch.ones_like(loss)
    found = prototype_loss_backward_triton(grad, logits, q, *rows, 0.1)
    assert torch.equal(found, prototype_loss_backward(grad, logits, q, *rows, 0.1))
    tau = torch.tensor(0.1, device=DEVICE).double()
    assert torch.equal(
        centered_softmax_triton(logits, None, tau), centered_softmax(logits, None, tau)
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_logits_and_their_gradient_are_products_of_rounded_factors(
    dtype: torch.dtype | None,
) -> None:
    z, C = (x.requires_grad_() for x in (randn(2, 3, 8), randn(5, 8, seed=1)))
    logits = prototype_logits(z, C, dtype)
    weight = randn(2, 3, 5, seed=2)
    dz, dC = torch.autograd.grad((logits * weight).sum(), (z, C))
    exact_z, exact_C, w = (x.detach().to(dtype or x.dtype).double() for x in (z, C, weight))
    expected = exact_z @ exact_C.mT, w @ exact_C, torch.einsum("vbk,vbd->kd", w, exact_z)
    for found, wanted in zip((logits, dz, dC), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
