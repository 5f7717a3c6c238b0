"""rdm_kernels.sinkhorn against the log domain in float64, and its marginals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels import sinkhorn
from rdm_kernels.sinkhorn import sinkhorn_op, sinkhorn_triton
from tests.kernels.common import DEVICE, Body, U, randn

BODIES = pytest.mark.parametrize("body", [sinkhorn_op, sinkhorn_triton], ids=["body", "kernel"])


def cosines(v: int, B: int, K: int, D: int = 6, seed: int = 0) -> Tensor:
    """Of random rows and prototypes."""
    z, C = randn(v, B, D, seed=seed), randn(K, D, seed=seed + 1)
    return torch.nn.functional.normalize(z, dim=-1) @ torch.nn.functional.normalize(C, dim=-1).mT


def in_log_domain(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    log_q = scores.double() / epsilon
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
        log_q = log_q - log_q.logsumexp(dim=2, keepdim=True)
    return log_q.exp()


def check(body: Body, scores: Tensor, epsilon: float, iterations: int) -> None:
    found = body(scores, torch.tensor(epsilon, device=DEVICE), iterations)
    # the temperature is rounded to float32, which is no error of the op
    expected = in_log_domain(scores, torch.tensor(epsilon).double().item(), iterations)
    B, K = scores.shape[1:]
    bound = (2 * iterations + 1) * (4 / epsilon + max(B, K) + 4) * U
    assert found.dtype == torch.float32
    assert ((found.double() - expected).abs() <= bound * expected).all()


@BODIES
@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 33]),
                    st.sampled_from([1, 2, 65])),
    epsilon=st.sampled_from([0.03, 0.05, 0.2, 1.0]),
    iterations=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_assignments_are_those_of_the_log_domain(
    shape: tuple[int, int, int], epsilon: float, iterations: int, seed: int, body: Body
) -> None:
    check(body, cosines(*shape, seed=seed), epsilon, iterations)


@BODIES
def test_duplicated_rows_and_a_prototype_that_nobody_is_near(body: Body) -> None:
    scores = cosines(2, 8, 20)
    scores[:, 4:] = scores[:, :4]
    scores[:, :, 7] = -1
    check(body, scores, 0.03, 3)
    q = body(scores, torch.tensor(0.05, device=DEVICE), 3)
    assert torch.equal(q[:, 4:], q[:, :4])


@BODIES
def test_rows_are_read_in_blocks(body: Body) -> None:
    check(body, cosines(1, 2, 1030), 0.05, 1)


@BODIES
@pytest.mark.parametrize(("B", "K"), [(9, 4), (4, 9)])
def test_rows_sum_to_one_and_after_many_iterations_columns_are_equal(
    B: int, K: int, body: Body
) -> None:
    epsilon = torch.tensor(0.05, device=DEVICE)
    scores = cosines(1, B, K)
    few, many = (body(scores, epsilon, n) for n in (1, 12))
    for q in (few, many):
        torch.testing.assert_close(q.sum(dim=2), torch.ones_like(q[:, :, 0]), atol=1e-5, rtol=0)
    columns = torch.full((1, K), B / K, device=DEVICE)
    torch.testing.assert_close(many.sum(dim=1), columns, atol=0, rtol=0.1)
    assert (few.sum(dim=1) / columns - 1).abs().max() > 0.1


@BODIES
def test_rows_of_minus_infinity_take_no_part(body: Body) -> None:
    scores, epsilon = cosines(2, 10, 20), torch.tensor(0.05, device=DEVICE)
    alone = body(scores[:, :6].contiguous(), epsilon, 3)
    scores[:, 6:] = -torch.inf
    q = body(scores, epsilon, 3)
    assert (q[:, 6:] == 0).all()
    torch.testing.assert_close(q[:, :6], alone, atol=1e-6, rtol=1e-5)
    assert (body(torch.full_like(scores, -torch.inf), epsilon, 3) == 0).all()


@BODIES
def test_a_score_that_is_not_finite_spreads_over_its_view(body: Body) -> None:
    scores = cosines(2, 5, 9)
    scores[1, 2, 3] = torch.nan
    q = body(scores, torch.tensor(0.05, device=DEVICE), 3)
    assert q[0].isfinite().all() and q[1].isnan().all()


def test_float64_is_not_narrowed() -> None:
    scores, epsilon = (
        cosines(1, 7, 9).double(),
        torch.tensor(0.05, device=DEVICE, dtype=torch.float64),
    )
    expected = in_log_domain(scores, 0.05, 3)
    for body in (sinkhorn, sinkhorn_triton):
        torch.testing.assert_close(body(scores, epsilon, 3), expected, atol=1e-14, rtol=1e-12)
