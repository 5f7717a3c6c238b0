"""One optimizer step: in parts, on several ranks, in 16 bits, and when something is not finite."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rdm_fast.config import Config
from rdm_fast.methods import build_method
from rdm_fast.training.train_step import TrainStep
from tests.ranks import run_ranks
from tests.tiny import METHODS, batch, rows_of, tiny, with_small_views

ROWS = 32
CPU = torch.device("cpu")


def new_step(config: Config, frozen_bn: bool = False) -> TrainStep:
    torch.manual_seed(0)
    method = build_method(config)
    step = TrainStep(method, config, CPU, steps_per_epoch=4)
    step.method.train(not frozen_bn)
    return step


def state(step: TrainStep) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in step.method.state_dict().items()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[name], atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", METHODS)
def test_parts_give_the_update_of_the_whole_batch_where_batch_norm_is_frozen(name: str) -> None:
    """Weights are of order 1 and gradients are summed in another order, in float32."""
    config = tiny(name, global_batch=ROWS)
    whole = new_step(config, frozen_bn=True)
    parts = new_step(replace(config, optim=replace(config.optim, accumulate=4)), frozen_bn=True)
    for i in range(5, 7):  # after the warm-up, which starts at zero
        reports = [step(batch(ROWS, seed=i), i) for step in (whole, parts)]
        torch.testing.assert_close(reports[0].loss, reports[1].loss, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            reports[0].branches.online, reports[1].branches.online, atol=1e-3, rtol=0
        )
    assert_close(state(whole), state(parts), 1e-5)


@pytest.mark.parametrize("name", ["digits_byol", "digits_rdm_byol"])
def test_parts_give_the_update_of_the_whole_batch_with_small_views(name: str) -> None:
    """In float32, as above. Small views do move the weights."""
    config = with_small_views(name, global_batch=ROWS)
    whole = new_step(config, frozen_bn=True)
    parts = new_step(replace(config, optim=replace(config.optim, accumulate=4)), frozen_bn=True)
    without = new_step(tiny(name, global_batch=ROWS), frozen_bn=True)
    seen = batch(ROWS, size=16, small=2)
    reports = [step(seen, 5) for step in (whole, parts)]
    torch.testing.assert_close(reports[0].loss, reports[1].loss, atol=1e-5, rtol=0)
    assert reports[0].branches.online.shape == reports[1].branches.online.shape == (4, ROWS, 24)
    assert_close(state(whole), state(parts), 1e-5)
    assert without(rows_of(batch(ROWS, size=16), slice(None)), 5).loss != reports[0].loss


def _rank_steps_with_small_views(name: str) -> list[Tensor]:
    step = new_step(with_small_views(name, global_batch=ROWS))
    step.warm_up_ddp_buckets()
    share = ROWS // dist.get_world_size()
    rows = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    for i in range(5, 7):
        step(rows_of(batch(ROWS, seed=i, size=16, small=2), rows), i)
    return list(state(step).values())


@pytest.mark.parametrize("name", ["digits_byol", "digits_rdm_byol"])
def test_ranks_take_the_step_of_one_rank_with_small_views(name: str, tmp_path: Path) -> None:
    step = new_step(with_small_views(name, global_batch=ROWS))
    for i in range(5, 7):
        step(batch(ROWS, seed=i, size=16, small=2), i)
    for results in run_ranks(2, _rank_steps_with_small_views, name, tmp_path=tmp_path):
        for ours, theirs in zip(results, state(step).values(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_parts_leave_running_statistics_as_one_pass_over_them_would() -> None:
    config = tiny("digits_rdm_simsiam", global_batch=ROWS, accumulate=2)
    twice = new_step(config)
    once = new_step(replace(config, predictor="mlp"))
    twice(batch(ROWS), 0)
    once(batch(ROWS), 0)
    statistics = twice.method.backbone.bn1
    assert torch.equal(statistics.running_mean, once.method.backbone.bn1.running_mean)
    assert int(statistics.num_batches_tracked) == 4  # two views in two parts


def _rank_steps(names: list[str], accumulate: int) -> list[list[Tensor]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    results = []
    for name in names:
        step = new_step(tiny(name, global_batch=ROWS, accumulate=accumulate))
        step.warm_up_ddp_buckets()
        for i in range(5, 7):
            whole = batch(ROWS, seed=i)
            report = step(rows_of(whole, rows), i)
        loss = report.loss.clone()
        dist.all_reduce(loss)
        results.append([loss / world, report.grad_norm, *state(step).values()])
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_take_the_step_that_one_rank_takes(world: int, tmp_path: Path) -> None:
    """Batch norm is synchronized; sums over rows associate differently, in float32."""
    ranks = run_ranks(world, _rank_steps, METHODS, 1, tmp_path=tmp_path)
    for m, name in enumerate(METHODS):
        step = new_step(tiny(name, global_batch=ROWS))
        for i in range(5, 7):
            report = step(batch(ROWS, seed=i), i)
        expected = [report.loss, report.grad_norm, *state(step).values()]
        for results in ranks:
            for ours, theirs in zip(results[m], expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_ranks_and_parts_together_take_the_step_of_parts_alone(tmp_path: Path) -> None:
    """Two ranks with two parts each put the same rows together in a batch norm as one rank does
    with two parts whose halves are the ranks' shares."""
    name = "digits_rdm_simsiam"
    results = run_ranks(2, _rank_steps, [name], 2, tmp_path=tmp_path)[0][0]
    step = new_step(tiny(name, global_batch=ROWS, accumulate=2))
    quarter = ROWS // 4
    order = torch.tensor(
        [r for part in range(2) for rank in range(2)
         for r in range((2 * rank + part) * quarter, (2 * rank + part + 1) * quarter)]
    )  # fmt: skip
    for i in range(5, 7):
        whole = batch(ROWS, seed=i)
        report = step(rows_of(whole, order), i)
    for ours, theirs in zip(results[2:], state(step).values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(results[0], report.loss, atol=2e-5, rtol=0)


def _rank_settles() -> list[Tensor]:
    step = new_step(tiny(global_batch=ROWS))
    before = state(step)
    step.warm_up_ddp_buckets()
    return [*before.values(), *state(step).values()]


def test_settling_leaves_no_trace(tmp_path: Path) -> None:
    for values in run_ranks(2, _rank_settles, tmp_path=tmp_path):
        half = len(values) // 2
        assert all(map(torch.equal, values[:half], values[half:]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_16_bit_autocast_follows_float32(name: str, precision: str) -> None:
    """Activations carry 8 or 11 bits; the first loss is a mean of cosines of them."""
    config = tiny(name, global_batch=ROWS)
    plain = new_step(config)(batch(ROWS), 5)
    step = new_step(replace(config, precision=precision))
    if precision == "fp16":  # the default scale of 65536 overflows until it has been lowered
        step.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    half = step(batch(ROWS), 5)
    assert half.applied
    assert abs(plain.loss - half.loss) < (0.1 if config.method == "byol" else 0.03)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_is_not_finite_changes_nothing(name: str, accumulate: int) -> None:
    step = new_step(tiny(name, global_batch=ROWS, accumulate=accumulate))
    step(batch(ROWS), 4)
    before = state(step)
    momentum = [s["momentum_buffer"].clone() for s in step.optimizer.state.values()]
    bad = batch(ROWS)
    bad.view1[3] = float("nan")
    assert not step(bad, 5).applied
    after = state(step)
    assert all(torch.equal(before[key], after[key]) for key in before)
    for old, new in zip(momentum, step.optimizer.state.values(), strict=True):
        assert torch.equal(old, new["momentum_buffer"])
    assert step(batch(ROWS), 6).applied


def test_fp16_overflow_lowers_the_loss_scale_and_skips_the_step() -> None:
    step = new_step(replace(tiny(global_batch=ROWS), precision="fp16"))
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = state(step)
    report = step(batch(ROWS), 5)
    assert not report.applied and report.loss.isfinite()
    assert step.scaler.get_scale() == 2.0**39
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(step).items())
