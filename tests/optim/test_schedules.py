"""rdm_fast.optim.schedules and .clipping against torch's, timm's and DINO's own formulas."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm.optim
import timm.scheduler
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from rdm_fast.config import OptimConfig
from rdm_fast.config.recipes import RECIPES
from rdm_fast.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    parameter_groups,
    set_learning_rate,
    set_weight_decay,
    weight_decay,
)
from tests.spies import Operators, waits

CPU = torch.device("cpu")

# ---- learning rate -----------------------------------------------------------------------------

SCHEDULE = OptimConfig(
    epochs=10, warmup_epochs=2, warmup_lr=0.1, base_lr=1.0, final_lr=0.2, global_batch=128
)  # peak 0.5; 100 steps, the first 20 rise


@pytest.mark.parametrize(
    ("step", "batch", "expected"),
    [
        (0, 128, 0.1),
        (5, 128, 0.2),  # 0.1 + (0.5 - 0.1) 5/20
        (19, 128, 0.48),
        (20, 128, 0.5),
        (60, 128, 0.35),  # halfway down
        (20 + 80 / 3, 128, 0.2 + 0.3 * 0.75),  # a third of the way down, cos(pi / 3) = 1/2
        (99, 128, 0.2 + 0.15 * (1 + math.cos(math.pi * 79 / 80))),
        (0, 1280, 0.1),  # the start is not scaled with the batch, the peak is
        (20, 1280, 5.0),
        (60, 1280, 2.6),
    ],
)
def test_the_learning_rate_by_hand(step: Any, batch: int, expected: float) -> None:
    optim = replace(SCHEDULE, global_batch=batch)
    assert math.isclose(learning_rate(step, 10, optim), expected, rel_tol=1e-12)


def test_the_schedule_is_byols_own_and_but_for_the_warm_up_solo_learns() -> None:
    """learning_schedule of deepmind-research, byol/utils/schedules.py, and _get_closed_form_lr of
    solo/utils/lr_scheduler.py, which is Lightning Bolts'."""
    optim = RECIPES["cifar10_byol"]().optim
    n = 50_000 // 256
    warmup, total, lr, start = 10 * n, 400 * n, 1.0, 3e-5
    steps = [0, 1, n, 5 * n + 7, warmup - 1, warmup, warmup + 1, 200 * n + 3, total - 1]
    for step in steps:
        byols = solo_learns = lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        behind = 0.0
        if step < warmup:
            byols = step / warmup * lr
            solo_learns = start + step * (lr - start) / (warmup - 1)
            behind = step * (lr - start) / (warmup * (warmup - 1))
        ours = learning_rate(step, n, replace(optim, warmup_lr=0.0))
        assert math.isclose(ours, byols, rel_tol=1e-12), step
        ours = learning_rate(step, n, optim)
        assert math.isclose(solo_learns - ours, behind, abs_tol=1e-13), step
    assert learning_rate(warmup - 1, n, optim) < learning_rate(warmup, n, optim) == lr


def test_simsiams_schedule_agrees_at_the_start_of_every_epoch() -> None:
    """adjust_learning_rate of main_simsiam.py moves once an epoch."""
    optim = RECIPES["imagenet_simsiam"]().optim
    for epoch in (0, 1, 33, 50, 99):
        theirs = 0.05 * 512 / 256 * 0.5 * (1.0 + math.cos(math.pi * epoch / 100))
        assert math.isclose(learning_rate(2502 * epoch, 2502, optim), theirs, rel_tol=1e-12)


@settings(max_examples=40)
@given(
    epochs=st.integers(1, 50),
    steps_per_epoch=st.integers(1, 40),
    warmup=st.floats(0, 1),
    base_lr=st.floats(0.01, 10),
)
def test_learning_rate_rises_then_falls_between_its_bounds(
    epochs: int, steps_per_epoch: int, warmup: float, base_lr: float
) -> None:
    optim = OptimConfig(
        epochs=epochs, warmup_epochs=warmup * epochs, base_lr=base_lr, warmup_lr=0.0, final_lr=0.0
    )
    rates = [learning_rate(s, steps_per_epoch, optim) for s in range(epochs * steps_per_epoch)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) >= 0 and max(rates) <= optim.lr


# ---- both schedules over 1,000 steps -----------------------------------------------------------

WHOLE = OptimConfig(
    epochs=100, warmup_epochs=8, warmup_lr=1e-6, base_lr=3e-4, final_lr=1e-6, global_batch=512,
    weight_decay=0.04, weight_decay_end=0.4,
)  # fmt: skip
PER_EPOCH, TOTAL, WARMUP = 10, 1000, 80


def torchs_rates() -> list[float]:
    """LinearLR, then CosineAnnealingLR."""
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=WHOLE.lr)
    rise = LinearLR(sgd, start_factor=WHOLE.warmup_lr / WHOLE.lr, total_iters=WARMUP)
    fall = CosineAnnealingLR(sgd, T_max=TOTAL - WARMUP, eta_min=WHOLE.final_lr)
    both = SequentialLR(sgd, [rise, fall], milestones=[WARMUP])
    rates = []
    for _ in range(TOTAL):
        rates.append(both.get_last_lr()[0])
        sgd.step()
        both.step()
    return rates


def timms_rates() -> list[float]:
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=WHOLE.lr)
    schedule = timm.scheduler.CosineLRScheduler(
        sgd, t_initial=TOTAL - WARMUP, lr_min=WHOLE.final_lr, warmup_t=WARMUP,
        warmup_lr_init=WHOLE.warmup_lr, warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip
    rates = []
    for step in range(TOTAL):
        schedule.step_update(step)
        rates.append(sgd.param_groups[0]["lr"])
    return rates


def dinos_schedule(base: float, final: float, warmup: int = 0, start: float = 0.0) -> list[float]:
    """cosine_scheduler of facebookresearch/dino, utils.py, which warms up to `base` itself."""
    steps = np.arange(TOTAL - warmup)
    fall = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / len(steps)))
    return [*np.linspace(start, base, warmup), *fall]


@pytest.mark.parametrize("theirs", [torchs_rates, timms_rates])
def test_a_thousand_learning_rates_are_theirs_in_float64(theirs: Callable[[], list[float]]) -> None:
    """torch's is a recurrence, which rounds at every step."""
    ours = [learning_rate(step, PER_EPOCH, WHOLE) for step in range(TOTAL)]
    np.testing.assert_allclose(ours, theirs(), rtol=1e-9)


def test_a_thousand_weight_decays_are_dinos_and_torchs_in_float64() -> None:
    ours = [weight_decay(step, PER_EPOCH, WHOLE) for step in range(TOTAL)]
    np.testing.assert_allclose(ours, dinos_schedule(0.04, 0.4), rtol=1e-12)
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.04)
    theirs = CosineAnnealingLR(dummy, T_max=TOTAL, eta_min=0.4)
    np.testing.assert_allclose(
        ours[::10], [theirs._get_closed_form_lr()[0] for theirs.last_epoch in range(0, TOTAL, 10)],
        rtol=1e-12,
    )  # fmt: skip
    rates = [learning_rate(step, PER_EPOCH, WHOLE) for step in range(TOTAL)]
    dinos = dinos_schedule(WHOLE.lr, WHOLE.final_lr, WARMUP, WHOLE.warmup_lr)
    np.testing.assert_allclose(rates[WARMUP:], dinos[WARMUP:], rtol=1e-12)


@pytest.mark.parametrize("end", [-1.0, 0.04])
def test_a_weight_decay_that_does_not_change_is_the_number_itself(end: float) -> None:
    optim = replace(WHOLE, weight_decay_end=end)
    assert {weight_decay(step, PER_EPOCH, optim) for step in range(TOTAL)} == {0.04}
    for name in ("sgd", "lars", "adamw"):
        optimizer = build_optimizer(nn.Linear(2, 2), replace(optim, optimizer=name), CPU)  # type: ignore[arg-type]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.04]
        assert not any("decay" in group for group in optimizer.param_groups)


# ---- a weight decay that changes ---------------------------------------------------------------


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(5, 4)).double()


def theirs_for(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch's plain optimizer, or timm's LARS, with weight decay as a number on the host."""
    for group in groups:
        group |= {"always_adapt": group["adapt"]}
    if name == "lars":
        return timm.optim.Lars(groups, momentum=0.9, trust_coeff=0.02, trust_clip=True)
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, foreach=False)
    return torch.optim.AdamW(groups, foreach=False)


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_a_thousand_steps_decay_as_those_of_torch_and_timm(name: str, exclude: bool) -> None:
    """In float64, but for rate and decay, which are float32 on the device: relative error 2^-24."""
    optim = replace(WHOLE, optimizer=name, decay_norm_and_bias=not exclude, base_lr=0.01)  # type: ignore[arg-type]
    ours, theirs = network(), network()
    optimizer = build_optimizer(ours, optim, CPU)
    reference = theirs_for(name, parameter_groups(theirs, optim))
    assert len(optimizer.param_groups) == 1 + exclude
    generator = torch.Generator().manual_seed(1)
    for step in range(TOTAL):
        lr, decay = learning_rate(step, 10, optim), weight_decay(step, 10, optim)
        set_learning_rate(optimizer, lr)
        set_weight_decay(optimizer, decay)
        for group in reference.param_groups:
            group |= {"lr": lr, "weight_decay": decay if group["adapt"] else 0.0}
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=generator, dtype=q.dtype) + q.detach()
            p.grad = q.grad + (p - q).detach()
        optimizer.step()
        reference.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6 * q.detach().abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_a_changing_decay_waits_for_nothing_and_a_skipped_step_decays_nothing(name: str) -> None:
    method = network().float()
    optimizer = build_optimizer(method, replace(WHOLE, optimizer=name), CPU)  # type: ignore[arg-type]
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    read: list[Any] = []
    for skipped in (0.0, 1.0):
        before = copy.deepcopy(method.state_dict())
        for p in method.parameters():
            p.grad = torch.full_like(p, math.nan if skipped else 1.0)
        optimizer.found_inf.fill_(skipped)  # type: ignore[attr-defined]
        with Operators(lambda operator, _: waits(operator) and read.append(operator)):
            set_weight_decay(optimizer, 0.3)
            optimizer.step()
        assert not read
        for key, tensor in method.state_dict().items():
            assert torch.equal(tensor, before[key]) == bool(
                skipped or "running" in key or "num" in key
            )


# ---- clipping ----------------------------------------------------------------------------------


def gradients(step: int) -> list[Tensor]:
    """Of very different norms, some zero, all moving with the step."""
    generator = torch.Generator().manual_seed(step)
    scales = torch.logspace(-4, 2, 6).roll(step)
    shapes = [(4, 3, 3, 3), (16, 8), (7,), (1,), (5, 1), (3, 0)]
    found = [
        scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    return [g.zero_() if (step + i) % 7 == 0 else g for i, g in enumerate(found)]


def torchs_clipping(parameters: list[nn.Parameter], limit: float) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=False)


def dinos_clipping(parameters: list[nn.Parameter], limit: float) -> None:
    """clip_gradients of facebookresearch/dino, utils.py."""
    for p in parameters:
        assert p.grad is not None
        factor = limit / (p.grad.norm(2) + 1e-6)
        if factor < 1:
            p.grad.mul_(factor)


@pytest.mark.parametrize(
    ("name", "clip"), [("clip_norm", torchs_clipping), ("clip_each", dinos_clipping)]
)
def test_a_thousand_gradients_are_clipped_as_by_torch_and_dino(
    name: str, clip: Callable[[list[nn.Parameter], float], None]
) -> None:
    clipped = 0
    for step in range(TOTAL):
        ours, theirs = gradients(step), [nn.Parameter(g) for g in gradients(step)]
        for p in theirs:
            p.grad = p.detach().clone()
        limit = 10.0 ** (step % 5 - 1)
        norm = torch.nn.utils.get_total_norm(ours)
        clip_gradients(ours, norm, replace(WHOLE, **{name: limit}))
        clip(theirs, limit)
        for g, p in zip(ours, theirs, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(g, p.grad, atol=0, rtol=1e-14)
            clipped += not torch.equal(p.grad, p.detach())
    assert 0 < clipped < TOTAL * len(ours)


def test_without_a_limit_no_bit_of_a_gradient_changes() -> None:
    ours = gradients(3)
    clip_gradients(ours, torch.nn.utils.get_total_norm(ours), OptimConfig())
    assert all(map(torch.equal, ours, gradients(3)))


@pytest.mark.parametrize("name", ["clip_norm", "clip_each"])
def test_clipping_waits_for_nothing(name: str) -> None:
    ours, read = gradients(0), list[Any]()
    with Operators(lambda operator, _: waits(operator) and read.append(operator)):
        norm = torch.nn.utils.get_total_norm(ours)
        clip_gradients(ours, norm, replace(WHOLE, **{name: 0.1}))
    assert not read
