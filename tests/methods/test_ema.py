"""rdm_fast.methods.ema against the formulas of BYOL in Python floats and float64."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rdm_fast.methods.ema import ema_momentum, update_ema


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))


@pytest.mark.parametrize(
    ("step", "expected"),
    # 1 - 0.01 (cos(pi k/K) + 1) / 2 at k/K = 0, 1/3, 1/2, 2/3, 1, by hand
    [(0, 0.99), (40, 0.9925), (60, 0.995), (80, 0.9975), (120, 1.0)],
)
def test_momentum_follows_the_papers_cosine(step: int, expected: float) -> None:
    assert math.isclose(ema_momentum(step, 120, 0.99, 1.0), expected, rel_tol=1e-12)


def test_momentum_ends_exactly_where_it_should() -> None:
    assert ema_momentum(37, 37, 0.9, 0.999) == 0.999
    assert ema_momentum(37, 37, 0.9, 1.0) == 1.0


@given(st.integers(1, 10**6), st.data(), st.floats(0, 1), st.floats(0, 1))
def test_momentum_rises_and_stays_between_its_ends(
    total: int, data: st.DataObject, a: float, b: float
) -> None:
    start, end = sorted((a, b))
    step = data.draw(st.integers(0, total - 1))
    now, then = ema_momentum(step, total, start, end), ema_momentum(step + 1, total, start, end)
    assert start - 1e-12 <= now <= then + 1e-15 <= end + 1e-12


@pytest.mark.parametrize("momentum", [0.99, 0.996, 0.5, 0.3])
def test_parameters_move_to_the_weighted_mean(momentum: float) -> None:
    target, online = network(0), network(1)
    before = [p.detach().double() for p in target.parameters()]
    update_ema(target, online, momentum)
    for old, slow, fast in zip(before, target.parameters(), online.parameters(), strict=True):
        expected = momentum * old + (1 - momentum) * fast.double()
        # weights are below 1 here, and float32 rounds the product and the sum at 6e-8 each
        torch.testing.assert_close(slow.double(), expected, atol=2e-7, rtol=0)


def test_momentum_one_keeps_bitwise_and_zero_copies() -> None:
    target, online = network(0), network(1)
    before = copy.deepcopy(target.state_dict())
    update_ema(target, online, 1.0)
    assert all(torch.equal(w, before[name]) for name, w in target.state_dict().items())
    update_ema(target, online, 0.0)
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        # slow + (fast - slow): weights are below 1, and each sum rounds at 6e-8
        torch.testing.assert_close(slow, fast, atol=2e-7, rtol=0)
        assert slow is not fast


@pytest.mark.parametrize("momentum", [1.0, 0.99999, 0.97, 0.3])
def test_a_momentum_on_the_device_is_that_of_a_number(momentum: float) -> None:
    target, other, online = network(0), network(0), network(1)
    update_ema(target, online, momentum)
    update_ema(other, online, torch.tensor(momentum, dtype=torch.float64))
    assert all(map(torch.equal, target.parameters(), other.parameters()))


def test_buffers_and_the_online_network_stay() -> None:
    target, online = network(0), network(1)
    online(torch.randn(4, 3, 3, 3))  # moves the online running statistics away from the target's
    target_buffers = {name: b.clone() for name, b in target.named_buffers()}
    online_before = copy.deepcopy(online.state_dict())
    update_ema(target, online, 0.5)
    assert all(torch.equal(b, target_buffers[name]) for name, b in target.named_buffers())
    assert all(torch.equal(w, online_before[name]) for name, w in online.state_dict().items())
    assert not torch.equal(target[1].running_mean, online[1].running_mean)


def test_no_gradient_flows_into_the_target() -> None:
    target, online = network(0), network(1)
    update_ema(target, online, 0.5)
    assert all(p.is_leaf and p.grad_fn is None for p in target.parameters())


def test_a_frozen_target_still_follows() -> None:
    target, online = network(0), network(1)
    target.requires_grad_(False)
    update_ema(target, online, 0.0)
    torch.testing.assert_close(target[3].weight, online[3].weight, atol=2e-7, rtol=0)
    assert not target[3].weight.requires_grad


def test_different_networks_are_refused_before_anything_moves() -> None:
    target = network(0)
    before = copy.deepcopy(target.state_dict())
    wider = network(1)
    wider[3] = nn.Linear(8, 6)
    with pytest.raises(ValueError, match=r"\[5, 8\] and torch.float32 \[6, 8\] as parameter 4"):
        update_ema(target, wider, 0.5)
    with pytest.raises(ValueError, match="got 6 and 4 parameters"):
        update_ema(target, network(1)[:3], 0.5)
    with pytest.raises(ValueError, match=r"torch.float32 .* and torch.bfloat16"):
        update_ema(target, network(1).bfloat16(), 0.5)
    assert all(torch.equal(w, before[name]) for name, w in target.state_dict().items())
