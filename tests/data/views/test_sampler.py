"""sampler against torchvision's get_params, and against itself at other shardings."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare, ks_2samp, kstest
from torchvision.transforms import ColorJitter, GaussianBlur, RandomAffine, RandomResizedCrop

from rdm_fast.config import ViewConfig
from rdm_fast.config.recipes import RECIPES
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
    with pytest.raises(IndexError, match="epoch of 3 steps"):
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
                getattr(own, field.name), getattr(whole.take(part), field.name)
            )


def test_of_a_resized_window_the_whole_is_taken_and_the_rest_is_as_drawn() -> None:
    drawn = draw(n=9)
    left = drawn.of_resized_windows(32)
    window = {"top": 0, "left": 0, "height": 32, "width": 32}
    for field in dataclasses.fields(ViewParameters):
        expected = np.full(9, window[field.name]) if field.name in window else None
        np.testing.assert_array_equal(
            getattr(left, field.name),
            getattr(drawn, field.name) if expected is None else expected,
        )


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


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.5, 1.0)])
@pytest.mark.parametrize("shape", [(100, 150), (32, 32), (30, 75)])
def test_windows_follow_random_resized_crop(
    scale: tuple[float, float], shape: tuple[int, int]
) -> None:
    view = ViewConfig(crop_scale=scale)
    ours = draw_views(view, 1, 0, np.arange(N), 0, *shape)
    image = torch.zeros(3, *shape)
    ratio = list(view.crop_ratio)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(scale), ratio) for _ in range(N)], float
    ).T
    mine = np.stack([ours.top, ours.left, ours.height, ours.width]).astype(float)
    for quantity in (
        lambda w: w[0],
        lambda w: w[1],
        lambda w: w[2],
        lambda w: w[3],
        lambda w: w[2] * w[3],
        lambda w: w[3] / w[2],
        lambda w: w[0] + w[2],
        lambda w: w[1] + w[3],
    ):
        assert ks_2samp(quantity(mine), quantity(theirs), method="asymp").pvalue > P


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
    """torch's random numbers, replaced by those of our sampler for one image."""

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
def test_windows_are_random_resized_crop_s_given_its_numbers(
    scale: tuple[float, float], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = ViewConfig(crop_scale=scale)
    ours = draw_views(view, 5, 0, np.arange(300), 0, *shape)
    image = torch.zeros(1, *shape)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # torchvision draws in it
    try:
        for i in range(300):
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


@pytest.mark.parametrize("name", ["cifar10_simsiam", "cifar10_byol", "imagenet_byol"])
def test_jitter_follows_color_jitter(name: str) -> None:
    view = RECIPES[name]().augment.view1
    ours = draw_views(view, 3, 1, np.arange(N), 0, 100, 150)
    ranges = [[1 - x, 1 + x] for x in (view.brightness, view.contrast, view.saturation)]
    theirs = [ColorJitter.get_params(*ranges, [-view.hue, view.hue]) for _ in range(N)]
    columns = np.array([row[1:] for row in theirs], float).T
    for mine, expected in zip(
        (ours.brightness, ours.contrast, ours.saturation, ours.hue), columns, strict=True
    ):
        assert ks_2samp(mine, expected).pvalue > P
    code = {tuple(order): i for i, order in enumerate(JITTER_ORDERS.tolist())}
    assert len(code) == 24
    counts = np.bincount(ours.order, minlength=24)
    expected_counts = np.bincount([code[tuple(row[0].tolist())] for row in theirs], minlength=24)
    assert chisquare(counts).pvalue > P and chisquare(expected_counts).pvalue > P


def uniform_pvalue(values: NDArray[np.float64], low: float, high: float) -> float:
    return float(kstest((values - low) / (high - low), "uniform").pvalue)


def test_angles_and_sigmas_follow_random_affine_and_gaussian_blur() -> None:
    p = draw()
    affine = [
        RandomAffine.get_params([-20, 20], None, None, [-12, 12], [100, 150]) for _ in range(N)
    ]
    assert ks_2samp(p.angle, [a[0] for a in affine]).pvalue > P
    assert ks_2samp(p.shear, [a[3][0] for a in affine]).pvalue > P
    assert ks_2samp(p.sigma, [GaussianBlur.get_params(0.1, 2.0) for _ in range(N)]).pvalue > P
    assert uniform_pvalue(p.angle, -20, 20) > P
    assert uniform_pvalue(p.shear, -12, 12) > P
    assert uniform_pvalue(p.sigma, 0.1, 2.0) > P


@pytest.mark.parametrize("name", ["jitter", "grey", "blur", "solarize", "flip"])
def test_coins_fall_as_often_as_asked(name: str) -> None:
    wanted, coins = getattr(EVERYTHING, name), getattr(draw(), name)
    assert abs(coins.mean() - wanted) < 3.3 * np.sqrt(wanted * (1 - wanted) / N)  # p = 0.001


def test_what_is_switched_off_is_neutral() -> None:
    off = ViewConfig(brightness=0, contrast=0, saturation=0, hue=0)
    p = draw_views(off, 0, 0, np.arange(50), 0, 32, 32)
    for name in ("angle", "shear", "hue", "jitter", "grey", "blur", "solarize", "flip"):
        assert not getattr(p, name).any(), name
    for name in ("brightness", "contrast", "saturation"):
        assert (getattr(p, name) == 1).all(), name
