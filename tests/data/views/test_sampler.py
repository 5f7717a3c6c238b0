"""The sampler against torchvision's get_params, and against itself at other shardings."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from torchvision.transforms import RandomResizedCrop

from rdm_fast.config import ViewConfig
from rdm_fast.data.views.philox import uniforms
from rdm_fast.data.views.sampler import (
    CROP_TRIES,
    JITTER_ORDERS,
    SCALAR_BLOCKS,
    VIEW_STREAM,
    ViewParameters,
    draw_views,
    epoch_order,
    step_indices,
)

N = 4000
P = 0.001  # of a false alarm in one comparison; the seeds are fixed, so it cannot flicker
EVERYTHING = ViewConfig(
    crop_scale=(0.08, 1.0), rotate=20, shear=12, jitter=0.8, saturation=0.2, grey=0.2, blur=0.5,
    solarize=0.2, flip=0.5,
)  # fmt: skip


def draw(n: int = N, seed: int = 3, epoch: int = 1, view: int = 0) -> ViewParameters:
    return draw_views(EVERYTHING, seed, epoch, np.arange(n), view, 100, 150)


@given(st.integers(1, 300), st.integers(0, 2**64 - 1), st.integers(0, 1000))
def test_an_epoch_visits_each_image_once(n: int, seed: int, epoch: int) -> None:
    np.testing.assert_array_equal(np.sort(epoch_order(seed, epoch, n)), np.arange(n))


def test_orders_differ_between_epochs_and_seeds() -> None:
    # two random permutations share one place on average; 12 or more has probability 1e-9
    orders = [epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 12


def test_every_image_is_equally_likely_at_every_place() -> None:
    first = np.array([epoch_order(0, epoch, 10)[0] for epoch in range(2000)])
    assert chisquare(np.bincount(first, minlength=10)).pvalue > P


@settings(max_examples=30)
@given(st.integers(1, 9), st.sampled_from([1, 2, 4]), st.integers(0, 11))
def test_ranks_share_a_step_as_one_rank_has_it(local: int, world: int, rest: int) -> None:
    batch = 4 * local
    order = epoch_order(0, 0, 3 * batch + min(rest, batch - 1))
    for step in range(3):
        parts = [step_indices(order, step, batch, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {batch // world}
        np.testing.assert_array_equal(
            np.concatenate(parts), order[step * batch : (step + 1) * batch]
        )
    with pytest.raises(IndexError):
        step_indices(order, 3, batch, 0, world)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_views_do_not_depend_on_who_draws_them(world: int) -> None:
    indices = epoch_order(0, 0, 64)
    heights, widths = 20 + indices % 7, 30 + indices % 5
    whole = draw_views(EVERYTHING, 7, 3, indices, 1, heights, widths)
    for part in np.split(np.arange(64), world):
        own = draw_views(EVERYTHING, 7, 3, indices[part], 1, heights[part], widths[part])
        for field in dataclasses.fields(ViewParameters):
            np.testing.assert_array_equal(
                getattr(own, field.name), getattr(whole, field.name)[part]
            )


def test_a_resized_window_is_taken_whole_and_the_rest_stays() -> None:
    drawn = draw(n=9)
    expected = dataclasses.asdict(drawn)
    expected |= {"top": np.full(9, 0), "left": np.full(9, 0)}
    expected |= {"height": np.full(9, 32), "width": np.full(9, 32)}
    np.testing.assert_equal(dataclasses.asdict(drawn.of_resized_windows(32)), expected)


@pytest.mark.parametrize("other", [{"seed": 4}, {"epoch": 2}, {"view": 1}, {"view": 2}])
def test_seeds_epochs_and_views_are_uncorrelated(other: dict[str, int]) -> None:
    a, b = draw(), draw(**other)
    for name in ("angle", "shear", "brightness", "contrast", "saturation", "hue", "sigma"):
        correlation = np.corrcoef(getattr(a, name), getattr(b, name))[0, 1]
        assert abs(correlation) < 4 / np.sqrt(N), name


def test_parameters_of_a_view_are_uncorrelated() -> None:
    drawn = draw()
    table = np.stack([getattr(drawn, field.name) for field in dataclasses.fields(drawn)][4:])
    correlation = np.corrcoef(table.astype(float)) - np.eye(len(table))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(N)  # 78 pairs


@pytest.mark.parametrize("shape", [(10, 1000), (1000, 10), (1, 80), (80, 1), (1, 1)])
def test_windows_that_never_fit_fall_back_as_random_resized_crop(shape: tuple[int, int]) -> None:
    view = ViewConfig(crop_scale=(1.0, 1.0))
    ours = draw_views(view, 0, 0, np.arange(3), 0, *shape)
    expected = RandomResizedCrop.get_params(
        torch.zeros(1, *shape), [1.0, 1.0], list(view.crop_ratio)
    )
    if shape != (1, 1):  # there a window may fit, and is the whole image
        assert expected[2:] != shape
    for row in range(3):
        assert (ours.top[row], ours.left[row], ours.height[row], ours.width[row]) == expected


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**32))
def test_windows_lie_within_the_image(height: int, width: int, seed: int) -> None:
    p = draw_views(EVERYTHING, seed, 0, np.arange(8), 0, height, width)
    assert (p.top >= 0).all() and (p.left >= 0).all()
    assert (p.height >= 1).all() and (p.width >= 1).all()
    assert (p.top + p.height <= height).all() and (p.left + p.width <= width).all()


class Numbers:
    """Replaces torch's random numbers by those of the sampler for one image."""

    def __init__(self, seed: int, index: int) -> None:
        first = len(SCALAR_BLOCKS)
        blocks = range(first, first + CROP_TRIES)
        tries = uniforms(seed, 0, np.array([index]), VIEW_STREAM, blocks).reshape(-1, 4)
        self.tries, self.left = iter(tries.tolist()), list[float]()

    def uniform_(self, tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        if len(self.left) != 3:  # not a ratio, which follows its area: another try
            self.left = next(self.tries)
        return tensor.fill_(low + (high - low) * self.left.pop(0))

    def randint(self, low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        assert low == 0
        return torch.tensor([int(self.left.pop(0) * high)])


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("shape", [(100, 150), (32, 32), (30, 75), (375, 500), (3, 2), (7, 90)])
def test_windows_equal_random_resized_crops_for_the_same_random_numbers(
    scale: tuple[float, float], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = ViewConfig(crop_scale=scale)
    ours = draw_views(view, 5, 0, np.arange(100), 0, *shape)
    image = torch.zeros(1, *shape)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # torchvision draws in it
    try:
        for i in range(100):
            numbers = Numbers(5, i)
            with monkeypatch.context() as patch:
                patch.setattr(
                    torch.Tensor, "uniform_", lambda t, a, b, n=numbers: n.uniform_(t, a, b)
                )
                patch.setattr(torch, "randint", numbers.randint)
                expected = RandomResizedCrop.get_params(image, list(scale), list(view.crop_ratio))
            assert (ours.top[i], ours.left[i], ours.height[i], ours.width[i]) == expected
    finally:
        torch.set_default_dtype(before)


def test_continuous_parameters_are_uniform() -> None:
    """As torchvision's ColorJitter, RandomAffine and GaussianBlur draw theirs."""
    p = draw()
    ranges = {"angle": (-20, 20), "shear": (-12, 12), "sigma": (0.1, 2.0), "hue": (-0.1, 0.1)}
    ranges |= {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2)}
    for name, (low, high) in ranges.items():
        values = getattr(p, name)
        assert kstest((values - low) / (high - low), "uniform").pvalue > P, name


def test_every_order_of_the_jitter_is_equally_likely() -> None:
    assert len({*map(tuple, JITTER_ORDERS.tolist())}) == 24
    assert (np.sort(JITTER_ORDERS, axis=1) == np.arange(4)).all()
    assert chisquare(np.bincount(draw().order, minlength=24)).pvalue > P


@pytest.mark.parametrize("name", ["jitter", "grey", "blur", "solarize", "flip"])
def test_coins_fall_as_often_as_asked(name: str) -> None:
    wanted, coins = getattr(EVERYTHING, name), getattr(draw(), name)
    assert abs(coins.mean() - wanted) < 3.3 * np.sqrt(wanted * (1 - wanted) / N)  # p = 0.001


def test_parameters_that_are_off_are_neutral() -> None:
    off = ViewConfig(brightness=0, contrast=0, saturation=0, hue=0)
    p = draw_views(off, 0, 0, np.arange(50), 0, 32, 32)
    for name in ("angle", "shear", "hue", "jitter", "grey", "blur", "solarize", "flip"):
        assert not getattr(p, name).any(), name
    for name in ("brightness", "contrast", "saturation"):
        assert (getattr(p, name) == 1).all(), name
