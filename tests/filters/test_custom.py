"""FilterConfig(kind="custom", response=...): a filter with the user's own g."""

from dataclasses import replace

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
from rdm_fast.spectrum import directions, measured_response
from tests.spectra import SHAPES, gradients, two_views


def band(s: Tensor) -> Tensor:
    """A filter that no kind is: the middle of the spectrum."""
    return torch.exp(-(s.log() ** 2))


@pytest.mark.parametrize("location", ["online", "target"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_custom_log_1_is_the_named_one(shape: tuple[int, int], location: str) -> None:
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


def test_the_function_sees_only_singular_values_above_the_cutoff() -> None:
    seen: list[Tensor] = []

    def response(s: Tensor) -> Tensor:
        seen.append(s)
        return 1 / s

    z1, z2 = two_views(24, 40, "rank 8")
    loss = spectral_loss(z1, z2, FilterConfig(kind="custom", location="target", response=response))
    assert loss.isfinite()
    assert all(s.dtype == torch.float64 and s.shape == (2, 24) and (s > 0).all() for s in seen)


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
        (lambda s: s.float(), "torch.float32 (1, 24)"),
        (lambda s: None, "None"),
    ],
)
def test_a_function_must_keep_shape_and_dtype(response: object, found: str) -> None:
    config = FilterConfig(kind="custom", response=response)  # type: ignore[arg-type]
    with pytest.raises(ValueError) as error:
        SpectralPredictor(config)(torch.randn(24, 40))
    assert found in str(error.value)


def test_a_function_is_neither_saved_nor_read() -> None:
    recipe = RECIPES["digits_rdm_simsiam"]()
    with pytest.raises(UsageError):
        config_to_dict(replace(recipe, filter=FilterConfig(kind="custom", response=band)))
    for saved in ({"kind": "custom"}, {"response": None}):
        with pytest.raises(DataError):
            config_from_dict({"filter": saved})
    assert "response" not in config_to_dict(Config())["filter"]
