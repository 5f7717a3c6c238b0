"""optim.apex with packages named apex that are right, wrong, broken, or absent."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rdm_fast.config import OptimConfig
from rdm_fast.errors import Unavailable
from rdm_fast.optim import apex as apex_optim
from rdm_fast.optim import build_optimizer, set_learning_rate
from rdm_fast.run.state import flatten_optimizer, restore_optimizer
from tests.spies import refused

GPU = torch.device("cuda")  # only asked for its type: the stand-ins below run anywhere

# The interface and the state of NVIDIA's: steps are counted in the group, zero_grad takes nothing.
REAL = """
import torch

class _Fused(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, momentum=0.0, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

class FusedSGD(_Fused):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                d = p.grad + group["weight_decay"] * p
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                p -= group["lr"] * self.state[p]["momentum_buffer"].mul_(group["momentum"]).add_(d)

class FusedAdam(_Fused):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p)
                m = state["exp_avg"].lerp_(p.grad, 0.1)
                p -= group["lr"] * m / (1 - 0.9 ** group["step"])

class FusedLAMB(FusedAdam):
    pass
"""
PYTHON_ONLY = """
class FusedSGD:
    def __init__(self, *args, **kwargs):
        raise RuntimeError("apex.optimizers.FusedSGD requires cuda extensions")
"""
Install = Callable[[str, str | None], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes `import apex` find a package with this __init__ and this apex.optimizers."""

    def install(package: str, optimizers: str | None) -> None:
        (tmp_path / "apex").mkdir()
        (tmp_path / "apex/__init__.py").write_text(package)
        if optimizers is not None:
            (tmp_path / "apex/optimizers").mkdir()
            (tmp_path / "apex/optimizers/__init__.py").write_text(optimizers)
        monkeypatch.syspath_prepend(tmp_path)

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
            del sys.modules[name]

    forget()
    yield install
    forget()


def method() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


# ---- what is not NVIDIA apex -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "optimizers", "optimizer", "parts"),
    [
        (None, None, "sgd", ["github.com/NVIDIA/apex"]),
        ("raise ImportError('pyramid')", None, "sgd", ["pip uninstall apex"]),
        ("", "raise ImportError('undefined symbol: _ZN3\\n in amp_C.so')", "sgd", ["_ZN3 in amp"]),
        ("", PYTHON_ONLY, "sgd", ["requires cuda extensions"]),
        ("", PYTHON_ONLY, "lamb", ["FusedLAMB"]),
    ],
    ids=["none", "another project", "another torch", "no extensions", "no such class"],
)
def test_an_unusable_apex_is_one_sentence_with_a_way_out(
    package: str | None,
    optimizers: str | None,
    optimizer: str,
    parts: list[str],
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if package is None:
        monkeypatch.setattr(apex_optim, "find_spec", lambda name: None)
    else:
        install(package, optimizers)
    optim = OptimConfig(optimizer=optimizer, backend="apex")  # type: ignore[arg-type]
    with pytest.raises(Unavailable) as caught:
        build_optimizer(method(), optim, GPU)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in ["optim.backend=apex", "optim.backend=torch", *parts])
    if optimizers is None:
        assert "apex" not in sys.modules  # recognized without running it


def test_apex_needs_a_gpu(install: Install) -> None:
    install("", REAL)
    with pytest.raises(Unavailable):
        build_optimizer(method(), OptimConfig(backend="apex"), torch.device("cpu"))


# ---- a stand-in for it -----------------------------------------------------------------------


def steps(method: nn.Module, optimizer: torch.optim.Optimizer, n: int, seed: int) -> list[Tensor]:
    """The weights after a few steps on drawn gradients."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(n):
        for p in method.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        set_learning_rate(optimizer, 0.1 / (i + 1))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in method.parameters())
    return [p.detach().clone() for p in method.parameters()]


@pytest.mark.parametrize(
    ("optimizer", "kind"), [("sgd", "FusedSGD"), ("adamw", "FusedAdam"), ("lamb", "FusedLAMB")]
)
def test_checkpoints_keep_state_bit_for_bit(optimizer: str, kind: str, install: Install) -> None:
    """The stand-in divides by 1 - 0.9^step, so a lost count of steps shows."""
    install("", REAL)
    optim = OptimConfig(optimizer=optimizer, backend="apex")  # type: ignore[arg-type]
    one = method()
    first = build_optimizer(one, optim, GPU)
    assert type(first).__name__ == kind
    steps(one, first, 3, seed=1)
    tensors, plain = flatten_optimizer(first, one.named_parameters())
    plain = json.loads(json.dumps(plain, allow_nan=False))
    assert all(plain[name] == 3 for name in plain) and bool(plain) == (optimizer != "sgd")

    other = method()
    other.load_state_dict(one.state_dict())
    second = build_optimizer(other, optim, GPU)
    steps(other, second, 1, seed=9)  # a state of its own, which must go
    other.load_state_dict(one.state_dict())
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    restore_optimizer(second, other.named_parameters(), tensors, plain)
    found, expected = steps(other, second, 3, seed=2), steps(one, first, 3, seed=2)
    assert all(map(torch.equal, found, expected))

    restore_optimizer(second, other.named_parameters(), {}, {})  # back to the beginning
    copied = method()
    copied.load_state_dict(other.state_dict())
    fresh = build_optimizer(copied, optim, GPU)
    assert all(map(torch.equal, steps(other, second, 2, seed=3), steps(copied, fresh, 2, seed=3)))


def test_settings_reach_apex(install: Install) -> None:
    install("", REAL)
    optim = OptimConfig(
        backend="apex", momentum=0.8, weight_decay=1e-3, decay_norm_and_bias=False, base_lr=0.25
    )
    groups = build_optimizer(method(), optim, GPU).param_groups
    assert [(group["momentum"], group["lr"], group["weight_decay"]) for group in groups] == [
        (0.8, 0.25, 1e-3),
        (0.8, 0.25, 0.0),
    ]


def test_apex_takes_the_steps_of_torchs_sgd(install: Install) -> None:
    install("", REAL)
    one, other = method(), method()
    apex = build_optimizer(one, OptimConfig(backend="apex", weight_decay=0.1), GPU)
    plain = build_optimizer(other, OptimConfig(weight_decay=0.1), torch.device("cpu"))
    for p, q in zip(steps(one, apex, 3, seed=1), steps(other, plain, 3, seed=1), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"optimizer": "lamb"}, {"optimizer": "lars", "backend": "apex"}], ids=str
)
def test_a_backend_refuses_optimizers_it_lacks(settings: dict[str, str]) -> None:
    with refused(ValueError, settings["optimizer"], "optim.backend=apex"):
        OptimConfig(**settings)  # type: ignore[arg-type]
