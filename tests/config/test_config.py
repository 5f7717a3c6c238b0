"""rdm_fast.config: derived values, and messages that name the flag, the value and the way out.

What the command line makes of each refused setting is tested in tests/cli/test_parse.py."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdm_fast.config import Config, FilterConfig, OptimConfig


def optim(global_batch: int, accumulate: int = 1, **other: float) -> OptimConfig:
    return OptimConfig(global_batch=global_batch, accumulate=accumulate, **other)  # type: ignore[arg-type]


@given(share=st.integers(2, 50), world=st.integers(1, 16), accumulate=st.integers(1, 8))
def test_local_batches_of_all_ranks_and_equal_parts_make_up_the_global_batch(
    share: int, world: int, accumulate: int
) -> None:
    local = optim(share * world * accumulate, accumulate).local_batch(world)
    assert local * world == share * world * accumulate
    assert local % accumulate == 0


@pytest.mark.parametrize(
    ("global_batch", "accumulate", "world", "expected"),
    [
        (256, 1, 3, "optim.global_batch=256 does not give each of 3 rank(s) the same 2 or more "
         "images: use 255 or 258"),
        (256, 3, 1, "optim.global_batch=256 does not give each of 1 rank(s) of 3 parts the same "
         "2 or more images: use 255 or 258"),
        (256, 2, 3, "optim.global_batch=256 does not give each of 3 rank(s) of 2 parts the same "
         "2 or more images: use 252 or 258"),
        (4, 1, 4, "optim.global_batch=4 does not give each of 4 rank(s) the same 2 or more "
         "images: use 8"),
        (3, 1, 4, "optim.global_batch=3 does not give each of 4 rank(s) the same 2 or more "
         "images: use 8"),
        (1, 1, 1, "optim.global_batch=1 does not give each of 1 rank(s) the same 2 or more "
         "images: use 2"),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_divide_is_told_the_nearest_that_do(
    global_batch: int, accumulate: int, world: int, expected: str
) -> None:
    with pytest.raises(ValueError) as caught:
        optim(global_batch, accumulate).local_batch(world)
    assert str(caught.value) == expected


@given(global_batch=st.integers(1, 400), world=st.integers(1, 16), accumulate=st.integers(1, 6))
def test_every_batch_that_the_message_offers_would_do(
    global_batch: int, world: int, accumulate: int
) -> None:
    try:
        optim(global_batch, accumulate).local_batch(world)
    except ValueError as error:
        offered = str(error).rpartition("use ")[2].split(" or ")
        for batch in map(int, offered):
            optim(batch, accumulate).local_batch(world)
        nearest = min(abs(int(batch) - global_batch) for batch in offered)
        assert nearest <= 2 * world * accumulate


@pytest.mark.parametrize(
    ("base", "batch", "lr"), [(0.5, 256, 0.5), (0.05, 512, 0.1), (0.4, 64, 0.1)]
)
def test_the_learning_rate_is_scaled_by_the_global_batch_over_256(
    base: float, batch: int, lr: float
) -> None:
    assert optim(batch, base_lr=base).lr == pytest.approx(lr)


@pytest.mark.parametrize(
    "name", ["base_lr", "warmup_epochs", "warmup_lr", "final_lr", "weight_decay"]
)
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_rates_and_decays_are_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"optim.{name}={value}"):
        optim(256, **{name: value})
    optim(256, **{name: 0.0})


@pytest.mark.parametrize("name", ["momentum", "ema_start", "ema_end"])
def test_momenta_are_from_zero_to_one(name: str) -> None:
    for value in (0.0, 1.0):
        optim(256, **{name: value})
    for value in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match=f"optim.{name}={value} is not a probability"):
            optim(256, **{name: value})


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-3, float("nan")])
def test_the_cutoff_lies_strictly_between_zero_and_one(value: float) -> None:
    with pytest.raises(ValueError, match=f"filter.cutoff={value} is not a share"):
        FilterConfig(cutoff=value)


def test_a_target_may_be_filtered_in_either_basis() -> None:
    assert FilterConfig(location="target", basis="online").basis == "online"
    assert FilterConfig(location="target").basis == "own"


@pytest.mark.parametrize("method", ["simsiam", "byol", "symsimsiam"])
@pytest.mark.parametrize("predictor", ["mlp", "spectral", "none"])
def test_exactly_the_symmetric_control_has_no_predictor(method: str, predictor: str) -> None:
    if (method == "symsimsiam") == (predictor == "none"):
        Config(method=method, predictor=predictor)  # type: ignore[arg-type]
    else:
        with pytest.raises(ValueError, match=f"method={method} with predictor={predictor}"):
            Config(method=method, predictor=predictor)  # type: ignore[arg-type]


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().optim.epochs = 3  # type: ignore[misc]
