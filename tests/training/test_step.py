"""One optimizer step: in parts, on several ranks, in 16 bits, and when something is not finite."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rdm_fast.config import Config
from rdm_fast.data import Batch
from rdm_fast.training.train_step import TrainStep
from tests.ranks import run_ranks
from tests.runs import new_step
from tests.tiny import METHODS, batch, own_rows, rows_of, tiny, with_small_views

ROWS = 32
SMALL = " with small views"
CLIPPED = {
    " clipped": {"clip_norm": 0.05, "weight_decay": 0.1, "weight_decay_end": 5.0},
    " clipped with lars": {
        "clip_each": 0.01, "optimizer": "lars", "weight_decay": 0.1, "weight_decay_end": 5.0
    },
}  # fmt: skip
NAMES = [*METHODS, *(f"{name}{SMALL}" for name in METHODS if name != "digits_symsimsiam")]
NAMES += [f"digits_rdm_simsiam{clipped}" for clipped in CLIPPED]


def state(step: TrainStep) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in step.method.state_dict().items()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[name], atol=tolerance, rtol=tolerance,
            msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip


def settings(name: str, accumulate: int = 1) -> Config:
    """Of a method, or of one with small views, or with clipping and a weight decay that changes."""
    name, space, changed = name.partition(" ")
    build = with_small_views if space + changed == SMALL else tiny
    clipped = CLIPPED.get(space + changed, {})
    return build(name, global_batch=ROWS, accumulate=accumulate, **clipped)


def seen(name: str, seed: int) -> Batch:
    small = name.endswith(SMALL)
    return batch(ROWS, seed=seed, size=16 if small else 8, small=2 if small else 0)


@pytest.mark.parametrize("name", NAMES)
def test_parts_give_the_update_of_the_whole_batch_if_batch_norm_is_frozen(name: str) -> None:
    """Weights are of order 1 and gradients are summed in another order, in float32."""
    whole, parts = new_step(settings(name)), new_step(settings(name, accumulate=4))
    for step in (whole, parts):
        step.method.eval()
    for i in range(5, 7):  # after the warm-up, which starts at zero
        one, other = (step(seen(name, i), i) for step in (whole, parts))
        torch.testing.assert_close(one.loss, other.loss, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.branches.online, other.branches.online, atol=1e-3, rtol=0)
    assert len(one.branches.online) == (4 if name.endswith(SMALL) else 2)
    assert_close(state(whole), state(parts), 1e-5)


def test_parts_leave_running_statistics_as_one_pass_over_them_would() -> None:
    config = settings("digits_rdm_simsiam", accumulate=2)
    twice, once = new_step(config), new_step(replace(config, predictor="mlp"))
    statistics = [step.method.backbone.bn1 for step in (twice, once)]
    for step in (twice, once):
        step(batch(ROWS), 0)
    assert torch.equal(statistics[0].running_mean, statistics[1].running_mean)
    assert int(statistics[0].num_batches_tracked) == 4  # two views in two parts


def _rank_steps(names: list[str], accumulate: int) -> list[list[Tensor]]:
    """Loss, gradient norm and state after two steps on this rank's rows; a warm-up before them
    leaves no trace."""
    results = []
    for name in names:
        step = new_step(settings(name, accumulate))
        before = state(step)
        step.warm_up_ddp_buckets()
        assert all(torch.equal(before[key], tensor) for key, tensor in state(step).items())
        for i in range(5, 7):
            report = step(own_rows(seen(name, i)), i)
        loss = report.loss.clone()
        dist.all_reduce(loss)
        results.append([loss / dist.get_world_size(), report.grad_norm, *state(step).values()])
    return results


@pytest.mark.parametrize(
    ("world", "names"),
    [(2, NAMES), (4, NAMES[-1:]), pytest.param(4, NAMES[:-1], marks=pytest.mark.slow)],
)
def test_ranks_take_the_step_that_one_rank_takes(
    world: int, names: list[str], tmp_path: Path
) -> None:
    """Batch norm is synchronized; sums over rows associate differently, in float32."""
    ranks = run_ranks(world, _rank_steps, names, 1, tmp_path=tmp_path)
    for m, name in enumerate(names):
        step = new_step(settings(name))
        for i in range(5, 7):
            report = step(seen(name, i), i)
        expected = [report.loss, report.grad_norm, *state(step).values()]
        for results in ranks:
            for found, wanted in zip(results[m], expected, strict=True):
                torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_ranks_and_parts_together_take_the_step_of_parts_alone(tmp_path: Path) -> None:
    """Two ranks with two parts each put the same rows together in a batch norm as one rank does
    with two parts whose halves are the ranks' shares."""
    name = "digits_rdm_simsiam"
    results = run_ranks(2, _rank_steps, [name], 2, tmp_path=tmp_path)[0][0]
    step = new_step(settings(name, accumulate=2))
    quarter = ROWS // 4
    order = torch.cat([torch.arange(ROWS).split(quarter)[k] for k in (0, 2, 1, 3)])
    for i in range(5, 7):
        report = step(rows_of(seen(name, i), order), i)
    for found, wanted in zip(results[2:], state(step).values(), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(results[0], report.loss, atol=2e-5, rtol=0)


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
    states = step.optimizer.state.values()
    kept = [{key: value.clone() for key, value in each.items()} for each in states]
    assert all(len(each) >= 1 for each in kept)
    bad = batch(ROWS)
    bad.view1[3] = float("nan")
    assert not step(bad, 5).applied
    after = state(step)
    assert all(torch.equal(before[key], after[key]) for key in before)
    for old, new in zip(kept, states, strict=True):
        assert all(torch.equal(value, new[key]) for key, value in old.items())
    assert step(batch(ROWS), 6).applied


def test_fp16_overflow_lowers_the_loss_scale_and_skips_the_step() -> None:
    step = new_step(replace(tiny(global_batch=ROWS), precision="fp16"))
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = state(step)
    report = step(batch(ROWS), 5)
    assert not report.applied and report.loss.isfinite()
    assert step.scaler.get_scale() == 2.0**39
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(step).items())
