"""methods.ema against the formulas of BYOL in Python floats and float64."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rdm_fast.methods.ema import ema_momentum, update_ema
from tests.spies import refused


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


@settings(max_examples=40)
@given(st.integers(1, 10**6), st.data(), st.floats(0, 1), st.floats(0, 1))
def test_momentum_rises_between_ends(total: int, data: st.DataObject, a: float, b: float) -> None:
    start, end = sorted((a, b))
    step = data.draw(st.integers(0, total - 1))
    now, then = ema_momentum(step, total, start, end), ema_momentum(step + 1, total, start, end)
    assert start - 1e-12 <= now <= then + 1e-15 <= end + 1e-12
    assert ema_momentum(total, total, start, end) == end


@pytest.mark.parametrize("momentum", [1.0, 0.99999, 0.99, 0.3, 0.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_only_parameters_move_to_the_weighted_mean(momentum: float, as_tensor: bool) -> None:
    target, online = network(0).requires_grad_(False), network(1)
    online(torch.randn(4, 3, 3, 3))  # the online running statistics leave the target's
    before, online_before = copy.deepcopy(target), copy.deepcopy(online.state_dict())
    tau = torch.tensor(momentum, dtype=torch.float64) if as_tensor else momentum
    update_ema(target, online, tau)
    for old, slow, fast in zip(
        before.parameters(), target.parameters(), online.parameters(), strict=True
    ):
        expected = momentum * old.double() + (1 - momentum) * fast.detach().double()
        # weights are below 1 here, and float32 rounds the product and the sum at 6e-8 each
        torch.testing.assert_close(slow.double(), expected, atol=2e-7, rtol=0)
        assert slow is not fast and not slow.requires_grad and slow.grad_fn is None
        assert momentum != 1 or torch.equal(slow, old)
    assert all(map(torch.equal, target.buffers(), before.buffers()))
    assert not torch.equal(target[1].running_mean, online[1].running_mean)
    assert all(torch.equal(w, online_before[name]) for name, w in online.state_dict().items())


def test_a_tensor_momentum_has_the_bits_of_a_number() -> None:
    target, other, online = network(0), network(0), network(1)
    update_ema(target, online, 0.97)
    update_ema(other, online, torch.tensor(0.97, dtype=torch.float64))
    assert all(map(torch.equal, target.parameters(), other.parameters()))


def test_different_networks_are_refused_before_anything_moves() -> None:
    target, wider = network(0), network(1)
    before = copy.deepcopy(target.state_dict())
    wider[3] = nn.Linear(8, 6)
    for online, found in (
        (wider, "[6, 8]"), (network(1)[:3], "6 and 4"), (network(1).bfloat16(), "bfloat16")
    ):  # fmt: skip
        with refused(ValueError, found):
            update_ema(target, online, 0.5)
    assert all(torch.equal(w, before[name]) for name, w in target.state_dict().items())
