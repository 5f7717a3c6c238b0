"""rdm_fast.training.ddp: what ranks average, how often, and that settings do what they say."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from rdm_fast.config import Config, OptimConfig, ParallelConfig
from rdm_fast.config.recipes import RECIPES
from rdm_fast.config.saved import rule
from rdm_fast.errors import UsageError
from rdm_fast.methods import build_method
from rdm_fast.training.ddp import wrap
from rdm_fast.training.train_step import TrainStep
from tests.ranks import run_ranks
from tests.runs import CPU, new_step
from tests.tiny import batch, own_rows, tiny

ROWS = 32
WORLD = 2
BFLOAT16 = 2.0**-8  # unit roundoff


def config(accumulate: int = 1, **parallel: object) -> Config:
    return replace(
        tiny(global_batch=ROWS, accumulate=accumulate),
        parallel=ParallelConfig(**parallel),  # type: ignore[arg-type]
    )


def train(step: TrainStep) -> list[Tensor]:
    """The weights after two steps."""
    step.warm_up_ddp_buckets()
    for number in range(5, 7):
        assert step(own_rows(batch(ROWS, seed=number)), number).applied
    return [tensor.detach().clone() for tensor in step.method.parameters()]


def gradients(step: TrainStep, *, averaged: bool) -> list[Tensor]:
    """Of one backward, on this rank alone or averaged over ranks."""
    assert isinstance(step.parallel, DistributedDataParallel)
    parts = own_rows(batch(ROWS))
    with step._no_sync(not averaged):
        step.parallel(*parts.views).loss.backward()
    found = [p.grad.clone() for p in step.method.parameters() if p.grad is not None]
    step.optimizer.zero_grad(set_to_none=True)
    return found


def reductions(step: TrainStep) -> Tensor:
    """The number of buckets a step sends, before buckets are rebuilt and after."""
    sent: list[int] = []

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent.append(bucket.index())
        return default_hooks.allreduce_hook(None, bucket)

    assert isinstance(step.parallel, DistributedDataParallel)
    step.parallel.register_comm_hook(None, count)
    counts = []
    for number in range(5, 7):
        step(own_rows(batch(ROWS)), number)
        counts.append(len(sent))
        sent.clear()
    return torch.tensor(counts)


def _rank() -> dict[str, list[Tensor]]:
    plain = new_step(config())
    plain.parallel = DistributedDataParallel(plain.method, gradient_as_bucket_view=True)
    found = {
        "torch's own defaults": train(plain),
        "default": train(new_step(config())),
        "static graph": train(new_step(config(static_graph=True))),
        "small buckets": train(new_step(config(bucket_mb=0.01))),
    }
    for compress in ("none", "bf16", "fp16"):
        step = new_step(config(compress=compress))
        found[f"alone, {compress}"] = gradients(step, averaged=False)
        found[f"averaged, {compress}"] = gradients(step, averaged=True)
    for parts in (1, 2):
        found[f"sent in {parts}"] = [reductions(new_step(config(accumulate=parts)))]
    found["sent in small buckets"] = [reductions(new_step(config(bucket_mb=0.01)))]
    return found


Ranks = list[dict[str, list[Tensor]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(WORLD, _rank, tmp_path=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    "setting", ["default", "torch's own defaults", "static graph", "small buckets"]
)
def test_no_setting_changes_a_bit_of_either_rank(setting: str, ranks: Ranks) -> None:
    """Between two ranks: two summands have one order."""
    for found in ranks:
        assert all(map(torch.equal, found[setting], ranks[0]["default"]))


def test_uncompressed_gradients_are_the_mean_over_ranks(ranks: Ranks) -> None:
    for alone, averaged in zip(
        zip(*(found["alone, none"] for found in ranks), strict=True),
        ranks[0]["averaged, none"],
        strict=True,
    ):
        torch.testing.assert_close(averaged, sum(alone) / WORLD, atol=0, rtol=2**-22)


@pytest.mark.parametrize(
    ("compress", "dtype", "unit"),
    [("bf16", torch.bfloat16, BFLOAT16), ("fp16", torch.float16, BFLOAT16 / 8)],
)
def test_compressed_gradients_have_16_bits_and_the_error_of_three_roundings(
    compress: str, dtype: torch.dtype, unit: float, ranks: Ranks
) -> None:
    """The cast, half of it, and the sum; below 2^-14 float16 has a fixed step of 2^-24."""
    smallest = 3 * 2.0**-25 if compress == "fp16" else 0.0
    different = False
    for found in ranks:
        assert all(map(torch.equal, found[f"alone, {compress}"], found["alone, none"]))
    for one, other, exact, sent in zip(
        *(found["alone, none"] for found in ranks),
        ranks[0]["averaged, none"],
        ranks[0][f"averaged, {compress}"],
        strict=True,
    ):
        assert torch.equal(sent, sent.to(dtype).float())
        bound = 1.01 * unit * (one.abs() + other.abs()) + 2 * smallest
        assert ((sent - exact).abs() <= bound).all()
        different |= not torch.equal(sent, exact)
    assert different
    assert all(map(torch.equal, *(found[f"averaged, {compress}"] for found in ranks)))


def test_a_step_in_parts_sends_its_gradient_once(ranks: Ranks) -> None:
    for found in ranks:
        (whole,), (parts,) = found["sent in 1"], found["sent in 2"]
        assert whole.tolist() == parts.tolist() and 0 < whole[1] <= 2


def test_smaller_buckets_are_more(ranks: Ranks) -> None:
    for found in ranks:
        (counts,) = found["sent in small buckets"]
        assert counts[1] > found["sent in 1"][0][1]


def test_one_rank_needs_no_wrapper() -> None:
    for parallel in (ParallelConfig(), ParallelConfig(compress="bf16", static_graph=True)):
        settings = replace(tiny(), parallel=parallel)
        method = build_method(settings)
        assert wrap(method, settings, CPU) is method


def _strides_differ(target: nn.Module, online: nn.Module) -> list[str]:
    pairs = zip(target.named_parameters(), online.parameters(), strict=True)
    return [name for (name, p), q in pairs if p.stride() != q.stride()]


def test_target_weights_lie_in_memory_as_the_online_ones() -> None:
    """Otherwise a GPU moves them one launch each: its fused form takes equal layouts only."""
    method = new_step(tiny("digits_byol")).method
    assert method.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
    assert _strides_differ(method.target_backbone, method.backbone) == []  # type: ignore[arg-type]
    assert _strides_differ(method.target_projector, method.projector) == []  # type: ignore[arg-type]


# ---- configuration ---------------------------------------------------------------------------


def test_a_static_graph_in_parts_is_refused() -> None:
    with pytest.raises(UsageError, match=r"parallel\.static[-_]graph"):
        Config(parallel=ParallelConfig(static_graph=True), optim=OptimConfig(accumulate=2))


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bucket_has_a_size(size: float) -> None:
    with pytest.raises(UsageError):
        ParallelConfig(bucket_mb=size)


def test_no_recipe_changes_how_gradients_are_averaged() -> None:
    assert all(recipe().parallel == ParallelConfig() for recipe in RECIPES.values())
    assert ParallelConfig() == ParallelConfig(bucket_mb=25.0, compress="none", static_graph=False)


def test_only_compression_makes_another_run() -> None:
    rules = [rule(f"parallel.{name}") for name in ("bucket_mb", "static_graph", "compress")]
    assert rules == ["free", "free", "identity"]
