"""FilterConfig(kind="custom", response=...): a user's own g, by the same mathematics as ours."""

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
def test_a_custom_log_1_is_the_one_that_has_a_name(shape: tuple[int, int], location: str) -> None:
    z1, z2 = two_views(*shape, "k^-1/2")
    named = FilterConfig(kind="log_1", location=location, engine="eigh")  # type: ignore[arg-type]
    custom = replace(named, kind="custom", response=torch.log1p)
    for ours, theirs in zip(gradients(z1, z2, named), gradients(z1, z2, custom), strict=True):
        assert torch.equal(ours, theirs)


def test_a_predictor_filters_by_the_function_it_was_given() -> None:
    z, _ = two_views(24, 40, "k^-1", torch.float64)
    p = SpectralPredictor(FilterConfig(kind="custom", response=band))(z)
    axes = directions(z)
    torch.testing.assert_close(measured_response(z, p, axes), band(axes.s), rtol=1e-6, atol=1e-9)


def test_the_function_sees_singular_values_above_the_cutoff_only() -> None:
    seen: list[Tensor] = []

    def response(s: Tensor) -> Tensor:
        seen.append(s)
        return 1 / s

    z1, z2 = two_views(24, 40, "rank 8")
    loss = spectral_loss(z1, z2, FilterConfig(kind="custom", location="target", response=response))
    assert loss.isfinite()
    assert all(s.dtype == torch.float64 and s.shape == (2, 24) and (s > 0).all() for s in seen)


def test_it_runs_by_the_eigh_engine_and_nothing_is_predicted_of_it() -> None:
    config = FilterConfig(kind="custom", response=band)
    assert EngineSelector(config).current(torch.device("cpu")) == "eigh"
    assert advice(config) is None and advice(replace(config, location="target")) is None


def test_what_cannot_be_meant_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="kind=custom is for Python code"):
        FilterConfig(kind="custom")
    with pytest.raises(ValueError, match="with kind=poly: a function goes with kind='custom'"):
        FilterConfig(response=band)
    with pytest.raises(ValueError, match="response=3 with kind=custom"):
        FilterConfig(kind="custom", response=3)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"engine=gemm cannot be accurate with filter\.kind=custom"
    ):
        FilterConfig(kind="custom", response=band, engine="gemm")


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (lambda s: s.sum(), r"made torch.float64 \(\) of them"),
        (lambda s: s.float(), r"made torch.float32 \(1, 24\) of them"),
        (lambda s: None, "made None of them"),
    ],
)
def test_a_function_that_gives_something_else_is_told_what(response: object, found: str) -> None:
    predictor = SpectralPredictor(
        FilterConfig(kind="custom", response=response)  # type: ignore[arg-type]
    )
    with pytest.raises(ValueError, match=found):
        predictor(torch.randn(24, 40))


def test_a_function_is_neither_saved_nor_read() -> None:
    custom = replace(
        RECIPES["digits_rdm_simsiam"](), filter=FilterConfig(kind="custom", response=band)
    )
    with pytest.raises(UsageError, match=r"holds a function, which config\.yaml cannot"):
        config_to_dict(custom)
    with pytest.raises(DataError, match="kind=custom is for Python code"):
        config_from_dict({"filter": {"kind": "custom"}})
    with pytest.raises(DataError, match=r"unknown setting filter\.response"):
        config_from_dict({"filter": {"response": None}})
    assert "response" not in config_to_dict(Config())["filter"]
