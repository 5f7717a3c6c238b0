"""FilterConfig(kind="custom", response=...): a filter with the user's own g."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_fast import FilterConfig, SpectralPredictor, spectral_loss
from rdm_fast.config import Config
from rdm_fast.config.recipes import RECIPES
from rdm_fast.config.saved import config_from_dict, config_to_dict
from rdm_fast.errors import DataError, UsageError
from rdm_fast.filters.engines import EngineSelector
from rdm_fast.filters.response import advice
from rdm_fast.spectrum import directions, filtered_eigenvalues, filtered_rows, measured_response
from tests.spectra import SHAPES, Shape, gradients, paper_loss, two_views, with_spectrum
from tests.spies import refused


def band(s: Tensor) -> Tensor:
    """A filter that no kind is: the middle of the spectrum."""
    return torch.exp(-(s.log() ** 2))


@pytest.mark.parametrize("location", ["online", "target"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_custom_log_1_is_the_named_one(shape: Shape, location: str) -> None:
    z1, z2 = two_views(*shape, "k^-1/2")
    named = FilterConfig(kind="log_1", location=location, engine="eigh")  # type: ignore[arg-type]
    custom = replace(named, kind="custom", response=torch.log1p)
    for ours, theirs in zip(gradients(z1, z2, named), gradients(z1, z2, custom), strict=True):
        assert torch.equal(ours, theirs)


def test_a_predictor_filters_by_its_function() -> None:
    z, _ = two_views(24, 40, "k^-1", torch.float64)
    p = SpectralPredictor(FilterConfig(kind="custom", response=band))(z)
    axes = directions(z)
    torch.testing.assert_close(measured_response(z, p, axes), band(axes.s), rtol=1e-6, atol=1e-9)


def soft_step(s: Tensor) -> Tensor:
    """docs/integrations.md's example: it compares the values of a batch with each other."""
    return torch.sigmoid(4 * (s / s.median() - 1))


def rank_8(seed: int, D: int, strongest: float) -> Tensor:
    """64 rows with singular values from 1 to `strongest`, evenly spaced, and zeros."""
    s = torch.zeros(min(64, D), dtype=torch.float64)
    s[:8] = torch.linspace(strongest, 1.0, 8)
    return with_spectrum(64, D, s, seed)


def soft_step_filter(z: Tensor) -> Tensor:
    """W for `rank_8`, its eight values one by one; the lower median is the fourth from below."""
    _, s, Vh = torch.linalg.svd(z.double(), full_matrices=False)
    kept = [float(value) for value in s[:8]]
    gains = [1 / (1 + math.exp(-4 * (value / kept[4] - 1))) for value in kept]
    W = torch.zeros(len(Vh.mT), len(Vh.mT), dtype=torch.float64)
    for gain, v in zip(gains, Vh, strict=False):
        W += gain * torch.outer(v, v)
    return W


@pytest.mark.parametrize("D", [96, 40])
@pytest.mark.parametrize("location", ["online", "target"])
def test_a_function_sees_the_values_of_one_view_above_the_cutoff(D: int, location: Any) -> None:
    """Views of different medians, and 56 or 32 directions that are cut off."""
    z1, z2 = rank_8(0, D, 3.0), rank_8(1, D, 500.0)
    config = FilterConfig(kind="custom", response=soft_step, location=location)
    found = gradients(z1, z2, config)
    expected = paper_loss(z1, z2, config, filter_of=lambda z, _: soft_step_filter(z))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for z in (z1, z2):
        p = SpectralPredictor(config)(z)
        torch.testing.assert_close(p, z @ soft_step_filter(z), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(filtered_rows(z, config), p, rtol=1e-9, atol=1e-9)
        expected_values = torch.linalg.svdvals(z @ soft_step_filter(z)).square().flip(0) / len(z)
        found_values = filtered_eigenvalues(z, config).sort().values
        torch.testing.assert_close(found_values, expected_values, rtol=1e-9, atol=1e-9)


def test_the_function_is_called_once_a_view_with_the_values_above_the_cutoff() -> None:
    seen: list[Tensor] = []

    def response(s: Tensor) -> Tensor:
        seen.append(s)
        return 1 / s

    z1, z2 = two_views(24, 40, "rank 8")
    config = FilterConfig(kind="custom", location="target", response=response)
    assert spectral_loss(z1, z2, config).isfinite()
    for s, z in zip(seen, (z2, z1), strict=True):  # the targets of view 1 are view 2's rows
        expected = torch.linalg.svdvals(z.double())
        expected = expected[expected > 1e-5].flip(0)
        torch.testing.assert_close(s, expected, rtol=1e-6, atol=0)
    seen.clear()
    assert spectral_loss(0 * z1, 0 * z2, config) == 0 and not seen


def test_it_uses_eigh_and_has_no_advice() -> None:
    config = FilterConfig(kind="custom", response=band)
    assert EngineSelector(config).current(torch.device("cpu")) == "eigh"
    assert advice(config) is None and advice(replace(config, location="target")) is None


def test_only_a_custom_filter_has_a_function() -> None:
    for wrong in (
        {"kind": "custom"},
        {"response": band},
        {"kind": "custom", "response": 3},
        {"kind": "custom", "response": band, "engine": "gemm"},
    ):
        with pytest.raises(ValueError):
            FilterConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (lambda s: s.sum(), "torch.float64 ()"),
        (lambda s: s.float(), "torch.float32 (24,)"),
        (lambda s: None, "None"),
    ],
)
def test_a_function_must_keep_shape_and_dtype(response: object, found: str) -> None:
    config = FilterConfig(kind="custom", response=response)  # type: ignore[arg-type]
    with refused(ValueError, found):
        SpectralPredictor(config)(torch.randn(24, 40))


def test_a_function_is_neither_saved_nor_read() -> None:
    recipe = RECIPES["digits_rdm_simsiam"]()
    with pytest.raises(UsageError):
        config_to_dict(replace(recipe, filter=FilterConfig(kind="custom", response=band)))
    for saved in ({"kind": "custom"}, {"response": None}):
        with pytest.raises(DataError):
            config_from_dict({"filter": saved})
    assert "response" not in config_to_dict(Config())["filter"]
