"""optim against timm's LARS, torch's SGD, a literal loop, and numbers computed by hand."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rdm_fast.config import OptimConfig
from rdm_fast.methods.ema import update_ema
from rdm_fast.optim import Lars, build_optimizer, parameter_groups, set_learning_rate
from tests.spies import Operators, waits

CPU = torch.device("cpu")
SHAPES = [(8, 3, 3, 3), (16, 8), (7,), (1,), (5, 1), (64, 33)]
STEPS = 20
TOLERANCE = 1e-6  # of a parameter's largest entry; 20 float32 steps of relative size 0.1 or less


class Method(nn.Module):
    """A method as the optimizer sees it: names, shapes, and what is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.projector = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
        self.projector[0].bias.requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2))
        self.predictor_norm = nn.BatchNorm1d(4)  # not the predictor's, despite its name


def names(method: nn.Module, group: dict[str, Any]) -> list[str]:
    name_of = {id(p): name for name, p in method.named_parameters()}
    return [name_of[id(p)] for p in group["params"]]


MATRICES = ["backbone.0.weight", "projector.0.weight"]
VECTORS = ["backbone.1.weight", "backbone.1.bias", "predictor_norm.weight", "predictor_norm.bias"]
PREDICTOR_VECTORS = ["predictor.1.weight", "predictor.1.bias"]

# ---- parameter groups --------------------------------------------------------------------------


def test_vectors_and_predictor_have_their_own_groups() -> None:
    method = Method()
    optim = OptimConfig(decay_norm_and_bias=False, fixed_predictor_lr=True, weight_decay=1e-4)
    found = [
        (names(method, group), group["weight_decay"], group["fixed_lr"], group["adapt"])
        for group in parameter_groups(method, optim)
    ]
    assert found == [
        (MATRICES, 1e-4, False, True),
        (VECTORS, 0.0, False, False),
        (["predictor.0.weight"], 1e-4, True, True),
        (PREDICTOR_VECTORS, 0.0, True, False),
    ]


def test_by_default_there_is_one_group() -> None:
    method = Method()
    optim = OptimConfig(decay_norm_and_bias=True, fixed_predictor_lr=False, weight_decay=1e-4)
    (group,) = parameter_groups(method, optim)
    assert (group["weight_decay"], group["fixed_lr"], group["adapt"]) == (1e-4, False, True)
    assert names(method, group) == [n for n, p in method.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(method, optim, CPU)
    set_learning_rate(optimizer, 0.125)
    assert {float(group["lr"]) for group in optimizer.param_groups} == {0.125}


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_fixed_predictor_keeps_its_learning_rate_and_the_rest_follows(optimizer: str) -> None:
    method = Method()
    config = OptimConfig(optimizer=optimizer, base_lr=0.5, global_batch=512)  # type: ignore[arg-type]
    optim = build_optimizer(method, config, CPU)
    for value in (0.25, 0.0):
        set_learning_rate(optim, value)
        for group in optim.param_groups:
            is_predictor = names(method, group)[0].startswith("predictor.")
            assert group["lr"] == (1.0 if is_predictor else value)  # 0.5 * 512 / 256


# ---- the optimizers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("lars", Lars), ("adamw", torch.optim.AdamW)]
)
def test_configuration_reaches_the_optimizer(name: str, kind: type) -> None:
    config = OptimConfig(
        optimizer=name,  # type: ignore[arg-type]
        momentum=0.8,
        weight_decay=3e-4,
        lars_eta=0.03,
        lars_clip=False,
        decay_norm_and_bias=True,
    )
    optim = build_optimizer(Method(), config, CPU)
    assert type(optim) is kind
    for group in optim.param_groups:
        assert group["weight_decay"] == 3e-4
        if name != "adamw":
            assert group["momentum"] == 0.8
        if name == "lars":
            assert (group["trust_coefficient"], group["clip"]) == (0.03, False)
        else:
            assert group["fused"] is True and not group["foreach"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cuda_graph_can_hold_adamw(device: str) -> None:
    with FakeTensorMode():
        optim = build_optimizer(Method(), OptimConfig(optimizer="adamw"), torch.device(device))
    assert optim.defaults["capturable"] is (device == "cuda")


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "a later step"])
def test_a_skipped_step_changes_nothing(name: str, first: bool) -> None:
    """Even with gradients that are not finite; and the next steps are as if it had not been."""
    torch.manual_seed(0)
    skips, never = Method(), Method()
    never.load_state_dict(skips.state_dict())
    config = OptimConfig(optimizer=name)  # type: ignore[arg-type]
    optims = [build_optimizer(method, config, CPU) for method in (skips, never)]
    found_inf = torch.zeros(())
    optims[0].found_inf = found_inf  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(1)
    for i in range(4):
        if i == (0 if first else 2):
            before = {key: value.clone() for key, value in skips.state_dict().items()}
            for p in skips.parameters():
                p.grad = torch.full_like(p, math.nan)
            found_inf.fill_(1)
            optims[0].step()
            assert all(torch.equal(v, before[key]) for key, v in skips.state_dict().items())
            found_inf.fill_(0)
        for p, q in zip(skips.parameters(), never.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optim in optims:
            optim.step()
    for ours, theirs in zip(optims[0].state.values(), optims[1].state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(map(torch.equal, skips.parameters(), never.parameters()))


def test_sgd_takes_the_papers_steps() -> None:
    """Two steps of p <- p - lr buf, buf <- m buf + (g + wd p), by hand."""
    method = nn.Linear(1, 1, bias=False)
    nn.init.constant_(method.weight, 2.0)
    config = OptimConfig(base_lr=0.1, global_batch=256, momentum=0.5, weight_decay=0.25)
    optim = build_optimizer(method, config, CPU)
    expected = [2 - 0.1 * 1.5, 1.85 - 0.1 * (0.75 + 1 + 0.25 * 1.85)]  # g + wd p = 1 + 0.5
    for value in expected:
        method.weight.grad = torch.ones(1, 1)
        optim.step()
        assert math.isclose(method.weight.item(), value, rel_tol=3e-7)  # float32


# ---- LARS --------------------------------------------------------------------------------------


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def drive(
    params: list[nn.Parameter],
    step: Callable[[], object],
    optimizer: torch.optim.Optimizer | None = None,
    scale: float = 1.0,
    still: int | None = None,
) -> None:
    """Twenty steps on gradients that depend on the parameters, with a moving learning rate.

    In every third step the gradient of the parameter numbered `still` is zero.
    """
    generator = torch.Generator().manual_seed(9)
    for i in range(STEPS):
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 + 0.4 * i / STEPS
        for p in params:
            p.grad = scale * (torch.randn(p.shape, generator=generator) + 0.1 * p.detach())
        if still is not None and i % 3 == 0:
            params[still].grad = torch.zeros_like(params[still])
        step()


def split(params: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return [p for p in params if p.dim() != 1], [p for p in params if p.dim() == 1]


def lars_groups(params: list[nn.Parameter], exclude: bool, **adapted: object) -> list[Any]:
    """All parameters in one group, or matrices in one and vectors, without decay, in another."""
    matrices, vectors = split(params) if exclude else (params, [])
    excluded = {"params": vectors, "weight_decay": 0.0, "adapt": False}
    return [{"params": matrices, **adapted}, *([excluded] if exclude else [])]


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # small gradients reach the clip, large ones not
def test_lars_equals_timms(clip: bool, weight_decay: float, exclude: bool, scale: float) -> None:
    ours, theirs = parameters(), parameters()
    shared: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": weight_decay}
    optim = Lars(lars_groups(ours, exclude), **shared, trust_coefficient=0.02, clip=clip)
    timms = timm.optim.Lars(
        lars_groups(theirs, exclude, always_adapt=True),
        **shared, trust_coeff=0.02, trust_clip=clip, foreach=False,
    )  # fmt: skip
    drive(ours, optim.step, optim, scale)
    drive(theirs, timms.step, timms, scale)
    for p, q in zip(ours, theirs, strict=True):
        atol = TOLERANCE * q.detach().abs().max().item()
        torch.testing.assert_close(p.double(), q.double(), atol=atol, rtol=0)


def literal_lars(
    params: list[nn.Parameter], buffers: list[Tensor], lr: float, wd: float, clip: bool
) -> None:
    """The update of RDM's released code (solo/utils/lars.py:139-165), a parameter at a time.

    One-dimensional parameters are excluded (its exclude_bias_n_norm).
    """
    with torch.no_grad():
        for p, buffer in zip(params, buffers, strict=True):
            d = p.grad
            assert d is not None
            p_norm, g_norm = float(p.norm()), float(d.norm())
            if p.dim() != 1 and p_norm != 0 and g_norm != 0:
                lars_lr = 0.02 * p_norm / (g_norm + p_norm * wd + 1e-8)
                if clip:
                    lars_lr = min(lars_lr / lr, 1)
                d = lars_lr * (d + wd * p)
            buffer.mul_(0.9).add_(d)
            p -= lr * buffer


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("lr", [0.3, 4.0])
def test_lars_equals_the_released_codes_in_float64(lr: float, clip: bool) -> None:
    """Also in layers that start at zero, and in steps where a layer's gradient is zero."""
    ours = [nn.Parameter(p.detach().double()) for p in parameters()]
    for start in (0, 2):
        nn.init.zeros_(ours[start])
    expected = [nn.Parameter(p.detach().clone()) for p in ours]
    optim = Lars(lars_groups(ours, exclude=True), lr=lr, weight_decay=1e-2, clip=clip)
    buffers = [torch.zeros_like(p) for p in expected]
    drive(ours, optim.step, still=1)
    drive(expected, lambda: literal_lars(expected, buffers, lr, 1e-2, clip), still=1)
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, atol=1e-12 * q.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("p", "g", "lr", "clip", "expected"),
    [
        # |p| = 5, |g| = 1: r = 0.02 * 5 / (1 + 0.1 * 5) = 1/15; d = r (g + 0.1 p)
        ([[3.0, 4.0]], [[0.6, 0.8]], 1.0, False, [[3 - 0.9 / 15, 4 - 1.2 / 15]]),
        # clipped at lr 0.04: min(1/15 / 0.04, 1) = 1, plain SGD
        ([[3.0, 4.0]], [[0.6, 0.8]], 0.04, True, [[3 - 0.04 * 0.9, 4 - 0.04 * 1.2]]),
        # clipped at lr 1: r / lr = 1/15 and the step is lr * that, as without the clip
        ([[3.0, 4.0]], [[0.6, 0.8]], 1.0, True, [[3 - 0.9 / 15, 4 - 1.2 / 15]]),
        # clipped at lr 0.5: r / lr = 2/15 times lr is again 1/15; unclipped it would be half of it
        ([[3.0, 4.0]], [[0.6, 0.8]], 0.5, True, [[3 - 0.9 / 15, 4 - 1.2 / 15]]),
        ([[3.0, 4.0]], [[0.6, 0.8]], 0.5, False, [[3 - 0.9 / 30, 4 - 1.2 / 30]]),
        # a zero layer starts with SGD's step, which the clip leaves alone even at lr 2
        ([[0.0, 0.0]], [[0.6, 0.8]], 0.5, True, [[-0.3, -0.4]]),
        ([[0.0, 0.0]], [[0.6, 0.8]], 2.0, True, [[-1.2, -1.6]]),
        # a layer without gradient stays where it is
        ([[3.0, 4.0]], [[0.0, 0.0]], 0.5, True, [[3.0, 4.0]]),
        ([[3.0, 4.0]], [[0.0, 0.0]], 0.5, False, [[3.0, 4.0]]),
        # at learning rate zero, the first step of a warm-up, nothing moves and nothing is NaN
        ([[3.0, 4.0]], [[0.6, 0.8]], 0.0, True, [[3.0, 4.0]]),
    ],
)
def test_one_step_of_lars_by_hand(
    p: list[list[float]], g: list[list[float]], lr: float, clip: bool, expected: list[list[float]]
) -> None:
    weight = nn.Parameter(torch.tensor(p))
    weight.grad = torch.tensor(g)
    Lars([weight], lr=lr, weight_decay=0.1, trust_coefficient=0.02, clip=clip).step()
    torch.testing.assert_close(weight.detach(), torch.tensor(expected), atol=0, rtol=3e-7)


def test_excluded_vectors_take_torchs_sgd_steps_bitwise() -> None:
    config = OptimConfig(optimizer="lars", decay_norm_and_bias=False, weight_decay=0.1)
    ours, theirs = Method(), Method()
    theirs.load_state_dict(ours.state_dict())
    plain = torch.optim.SGD(theirs.parameters(), lr=config.lr, momentum=config.momentum, fused=True)
    optim = build_optimizer(ours, config, CPU)
    for _ in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optim.step()
        plain.step()
    for name in VECTORS + PREDICTOR_VECTORS:
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)), name
    for name in MATRICES:
        assert not torch.equal(ours.get_parameter(name), theirs.get_parameter(name)), name


def test_lars_leaves_gradients_and_parameters_without_gradient_unchanged() -> None:
    params = parameters()
    optim = Lars(params, lr=0.1, weight_decay=0.1)
    params[0].grad = torch.randn_like(params[0])
    kept = params[0].grad.clone()
    before = [p.detach().clone() for p in params]
    optim.step()
    assert torch.equal(params[0].grad, kept)
    assert not torch.equal(params[0], before[0])
    for p, old in zip(params[1:], before[1:], strict=True):
        assert torch.equal(p, old) and p not in optim.state


def test_restored_lars_continues_bitwise() -> None:
    params = parameters()
    optim = Lars(params, lr=0.1, weight_decay=1e-3)
    drive(params, optim.step, optim)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    restored = Lars(twins, lr=0.7, weight_decay=0.0)
    restored.load_state_dict(copy.deepcopy(optim.state_dict()))
    assert {key for state in restored.state.values() for key in state} == {"momentum_buffer"}
    drive(params, optim.step, optim)
    drive(twins, restored.step, restored)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def fits_one_launch(operator: Any, args: Any) -> bool:
    """Whether it is no foreach operator, or all its lists have equal shapes and strides."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and len(arg)]
    foreach = lists if "_foreach" in str(operator) else []
    layouts = [[(p.shape, p.stride()) for p in each] for each in foreach]
    return all(layout == layouts[0] for layout in layouts)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["lars", "lars without clip", "ema"])
def test_launches_wait_for_nothing_and_do_not_grow_with_the_number_of_parameters(
    kind: str, layout: torch.memory_format
) -> None:
    """On a GPU a foreach operator is one launch for lists of equal shapes and strides."""
    counts = []
    seen: list[tuple[Any, Any]] = []
    for copies in (1, 4):
        network = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(copies)), nn.Linear(5, 2))
        network.to(memory_format=layout)  # type: ignore[call-overload]
        target = copy.deepcopy(network)
        optim = Lars(network.parameters(), lr=0.1, weight_decay=1e-3, clip=kind == "lars")
        for p in network.parameters():
            p.grad = torch.randn_like(p)
        optim.step()  # makes the buffers
        seen.clear()
        with Operators(lambda *call: seen.append(call)):
            update_ema(target, network, 0.99) if kind == "ema" else optim.step()
            network[-1].weight.sum().item()
        assert [waits(operator) for operator, _ in seen].index(True) == len(seen) - 1  # .item()
        assert all(fits_one_launch(*call) for call in seen)
        counts.append(sum(not operator.is_view for operator, _ in seen))
    assert counts[0] == counts[1] > 2  # more than .sum() and .item()


def test_lars_returns_the_closures_loss() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optim = Lars([weight], lr=0.1)

    def closure() -> float:
        loss = weight.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optim.step(closure) == 4.0
    assert not torch.equal(weight, torch.ones(2, 2))
