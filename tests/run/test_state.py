"""rdm_fast.run.state, against optimizers and modules that were never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdm_fast.config import OptimConfig
from rdm_fast.errors import DataError
from rdm_fast.optim import build_optimizer
from rdm_fast.run import checkpoint
from rdm_fast.run.checkpoint import Snapshot
from rdm_fast.run.state import (
    flatten_optimizer,
    flatten_parts,
    restore_optimizer,
    restore_parts,
)

CPU = torch.device("cpu")


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def build(optim: OptimConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net, build_optimizer(net, optim, CPU)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "optim",
    [
        OptimConfig(optimizer="sgd"),
        OptimConfig(optimizer="sgd", momentum=0.0),
        OptimConfig(optimizer="lars"),
        OptimConfig(optimizer="lars", decay_norm_and_bias=False),
        OptimConfig(optimizer="adamw", base_lr=1e-3),
    ],
    ids=["sgd", "sgd without momentum", "lars", "lars with exclusions", "adamw"],
)
def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(
    tmp_path: Path, optim: OptimConfig
) -> None:
    net, optimizer = build(optim)
    train(net, optimizer, 0, 3)
    tensors, plain = flatten_optimizer(optimizer, net.named_parameters())
    saved = Snapshot(3, dict(net.state_dict()), tensors, {}, {"optimizer": plain})
    loaded = checkpoint.load(checkpoint.save(tmp_path, saved, keep=2))
    train(net, optimizer, 3, 6)

    resumed, again = build(optim)
    train(resumed, again, 50, 51)  # any state it may have is replaced
    resumed.load_state_dict(loaded.model)
    restore_optimizer(again, resumed.named_parameters(), loaded.optim, loaded.state["optimizer"])
    train(resumed, again, 3, 6)
    for name, tensor in net.state_dict().items():
        assert bits(resumed.state_dict()[name]) == bits(tensor), name
    states = (flatten_optimizer(optimizer, net.named_parameters())[0],
              flatten_optimizer(again, resumed.named_parameters())[0])  # fmt: skip
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert bits(states[1][name]) == bits(tensor), name
        assert states[1][name].stride() == tensor.stride(), name


def test_plain_optimizer_values_and_none_come_back(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {"momentum_buffer": None, "count": 3, "factor": 0.1}
    tensors, plain = flatten_optimizer(optimizer, [("p", parameter)])
    assert tensors == {} and plain == {"p/momentum_buffer": None, "p/count": 3, "p/factor": 0.1}
    state = {"optimizer": plain}
    loaded = checkpoint.load(checkpoint.save(tmp_path, Snapshot(1, {}, {}, {}, state), keep=2))
    before = dict(optimizer.state[parameter])
    optimizer.state.clear()
    restore_optimizer(optimizer, [("p", parameter)], loaded.optim, loaded.state["optimizer"])
    assert dict(optimizer.state[parameter]) == before


@pytest.mark.parametrize("kind", ["sgd", "lars", "adamw"])
def test_restoring_leaves_hyper_parameters_and_the_given_tensors_alone(kind: Any) -> None:
    net, optimizer = build(OptimConfig(optimizer=kind))
    train(net, optimizer, 0, 1)
    tensors, plain = flatten_optimizer(optimizer, net.named_parameters())
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    group = optimizer.param_groups[0]
    group["lr"] = 0.0123
    restore_optimizer(optimizer, net.named_parameters(), tensors, plain)
    assert optimizer.param_groups[0] is group and group["lr"] == 0.0123
    train(net, optimizer, 1, 2)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_restoring_forgets_the_state_that_was_there() -> None:
    net, optimizer = build(OptimConfig(optimizer="sgd"))
    train(net, optimizer, 0, 1)
    restore_optimizer(optimizer, net.named_parameters(), {}, {})
    assert flatten_optimizer(optimizer, net.named_parameters()) == ({}, {})


def test_state_of_other_parameters_is_refused_by_name() -> None:
    net, optimizer = build(OptimConfig(optimizer="sgd"))
    unknown = {"9.weight/momentum_buffer": torch.zeros(3)}
    with pytest.raises(DataError) as raised:
        restore_optimizer(optimizer, net.named_parameters(), unknown, {})
    assert "9.weight/momentum_buffer" in str(raised.value)
    misshapen = {"3.weight/momentum_buffer": torch.zeros(3, 65)}
    with pytest.raises(DataError) as raised:
        restore_optimizer(optimizer, net.named_parameters(), misshapen, {})
    assert "3.weight/momentum_buffer" in str(raised.value)


# ---- parts -----------------------------------------------------------------------------------


class Part:
    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_parts_get_back_their_tensors_and_values_and_new_ones_keep_theirs() -> None:
    parts = {
        "probe": Part(weight=torch.arange(3.0), rows=7),
        "scaler": Part(),
        "guard": Part(low=2),
    }
    extra, plain = flatten_parts(parts)
    assert list(extra) == ["probe/weight"]
    assert plain == {"probe": {"rows": 7}, "scaler": {}, "guard": {"low": 2}}
    restored = {name: Part(start=True) for name in (*parts, "new")}
    restore_parts(restored, Snapshot(1, {}, {}, extra, plain))
    assert restored["probe"].state.keys() == {"weight", "rows"}
    assert torch.equal(restored["probe"].state["weight"], torch.arange(3.0))
    assert restored["guard"].state == {"low": 2}
    assert restored["scaler"].state == restored["new"].state == {"start": True}
