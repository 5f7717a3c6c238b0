"""filters.response against the formulas g(s) in Python floats, and RDM's claims about them."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.filters.response import advice, cutoff, few_rows, response, trend, unit_roundoff
from rdm_fast.spectrum import effective_rank
from tests.spectra import g

LOGS = [FilterConfig(kind=kind) for kind in ("log", "log_1", "log_2")]
POLY = [FilterConfig(sigma=sigma) for sigma in (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)]
each_filter = pytest.mark.parametrize("config", POLY + LOGS, ids=lambda c: f"{c.kind} {c.sigma:g}")
few = settings(max_examples=30)
spectra = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12)


def column(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def tau(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


# ---- the response -----------------------------------------------------------------------------


@each_filter
@few
@given(values=spectra, scale=st.floats(1e-6, 1e6))
def test_response_is_its_formula(config: FilterConfig, values: list[float], scale: float) -> None:
    """poly is divided by its value at the largest s, which makes it independent of the scale."""
    s = column(values)
    found, expected = response(config, s, tau(0.0)), g(config, s)
    if config.kind == "poly":
        expected = expected / g(config, s.amax())
        torch.testing.assert_close(response(config, s * scale, tau(0.0)), found, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("config", POLY, ids=lambda c: f"{c.sigma:g}")
def test_poly_is_one_at_the_largest_kept_value_at_every_scale(config: FilterConfig) -> None:
    for scale in (1e-6, 1.0, 1e6):
        s = scale * column([0.0, 1e-5, 0.1, 0.5])
        assert response(config, s, tau(scale * 1e-3))[0, 3] == 1.0


@each_filter
def test_values_up_to_tau_are_cut_off_and_the_rest_unchanged(config: FilterConfig) -> None:
    s = column([0.0, 1e-300, 0.2, math.nextafter(0.2, 1), 3.0])
    found = response(config, s, tau(0.2))[0]
    assert found[:3].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(found[3:], response(config, s[:, 3:], tau(0.0))[0])
    assert (found[3:] != 0).all()


@each_filter
@pytest.mark.parametrize("values", [[0.0, 0.0], [-1e-9, 0.0, 2.0], [1e-200, 1e200], [1.0]])
def test_a_finite_spectrum_has_a_finite_response(config: FilterConfig, values: list[float]) -> None:
    s = column(values)
    threshold = cutoff(s, samples=4, features=4, dtype=torch.float32, relative=1e-3)
    found = response(config, s, threshold)
    if not (config.kind == "log_2" and max(values) > 1e150):  # s^2 is out of range
        assert found.isfinite().all()
    assert (found[s <= 0] == 0).all()


@each_filter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_views_are_filtered_apart_in_their_dtype(config: FilterConfig, dtype: torch.dtype) -> None:
    one, other = (column(v).to(dtype) for v in ([0.5, 2.0, 4.0], [1e-5, 7.0, 100.0]))
    thresholds = torch.tensor([[0.0], [1e-3]], dtype=dtype)
    both = response(config, torch.cat([one, other]), thresholds)
    assert both.dtype == dtype
    torch.testing.assert_close(both[:1], response(config, one, thresholds[:1]))
    torch.testing.assert_close(both[1:], response(config, other, thresholds[1:]))


# ---- the cutoff -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "u"),
    [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-24)],
    ids=str,
)
def test_the_cutoff_is_the_larger_term_and_above_rounding(dtype: torch.dtype, u: float) -> None:
    assert unit_roundoff(dtype) == u

    @few
    @given(values=spectra, relative=st.floats(1e-6, 0.5))
    def is_the_larger_term(values: list[float], relative: float) -> None:
        found = cutoff(column(values), samples=6, features=20, dtype=dtype, relative=relative)
        rms = math.sqrt(sum(s * s for s in values) / (6 * 20))
        noise = 0.75 * u * rms * (math.sqrt(6) + math.sqrt(20))
        assert found.shape == (1, 1)
        assert found.item() == pytest.approx(max(relative * max(values), noise), rel=1e-12)

    is_the_larger_term()
    for B, D in ((64, 64), (64, 256), (256, 64)):  # a random matrix, rounded, minus itself
        exact = torch.randn(B, D, dtype=torch.float64)
        noise = float(torch.linalg.matrix_norm(exact.to(dtype).double() - exact, 2))
        s = torch.linalg.svdvals(exact)[None]
        found = cutoff(s, samples=B, features=D, dtype=dtype, relative=1e-12).item()
        assert noise < found < 3 * noise


def test_views_have_their_own_cutoffs() -> None:
    s = torch.tensor([[1.0, 10.0], [5.0, 2.0]], dtype=torch.float64)
    found = cutoff(s, samples=2, features=2, dtype=torch.float64, relative=0.1)
    assert found.tolist() == [[1.0], [0.5]]


# ---- RDM --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        *((FilterConfig(sigma=sigma), "rising") for sigma in (1e-3, 0.5, 2.0)),
        *((FilterConfig(sigma=sigma), "falling") for sigma in (-1e-3, -0.5, -2.0)),
        (FilterConfig(sigma=0.0), "flat"),
        *((replace(config, sigma=sigma), "rising") for config in LOGS for sigma in (-1.0, 0.0)),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.kind} {x.sigma:g}",
)
def test_the_trend_is_the_slopes_sign_and_gives_advice(config: FilterConfig, expected: str) -> None:
    assert trend(config) == expected
    found = response(config, column([1.5, 2.0, 3.0, 9.0]), tau(0.0))[0].diff()
    assert (found.sign() == {"rising": 1, "falling": -1, "flat": 0}[expected]).all()
    for location, other, wrong in (("online", "target", "falling"), ("target", "online", "rising")):
        text = advice(replace(config, location=location))  # type: ignore[arg-type]
        assert (text is not None) == (expected == wrong)
        if text is not None:
            named = f"sigma={config.sigma:g}" if config.kind == "poly" else f"kind={config.kind}"
            assert f"filter.location={location}" in text and named in text
            assert text.endswith(f"filter.location={other}.")


def ranks(config: FilterConfig, values: list[float]) -> tuple[float, float]:
    """Effective rank of the correlation before and after the filter: of s^2 and (s g(s))^2."""
    s = column(values)
    after = (s * response(config, s, tau(0.0))).square()
    return float(effective_rank(s.square())), float(effective_rank(after))


@pytest.mark.parametrize(
    "config",
    [*POLY[3:], *LOGS, *(FilterConfig(sigma=s) for s in (-1.0, -0.7, -0.3))],
    ids=lambda c: f"{c.kind} {c.sigma:g}",
)
@few
@given(values=spectra)
def test_a_rising_filter_lowers_the_effective_rank_and_a_falling_one_raises_it(
    config: FilterConfig, values: list[float]
) -> None:
    """The filtered spectrum majorizes the other, and entropy is Schur-concave."""
    if config.kind == "log":  # below 1 it is negative and falls in |g|
        values = [1.1 + s for s in values]
    before, after = ranks(config, values)
    if trend(config) == "rising":
        assert after <= before * (1 + 1e-9)
    else:
        assert after >= before * (1 - 1e-9)
        if config.sigma == -1.0:
            assert after == pytest.approx(len(values), rel=1e-9)


def test_the_change_of_rank_is_strict_for_a_spectrum_that_is_not_flat() -> None:
    for config in (FilterConfig(sigma=0.5), *LOGS[1:]):
        before, after = ranks(config, [1.0, 2.0, 4.0, 8.0])
        assert after < 0.99 * before
    before, after = ranks(FilterConfig(sigma=-0.5), [1.0, 2.0, 4.0, 8.0])
    assert after > 1.01 * before


def test_a_batch_under_an_eighth_of_the_width_is_warned_of_with_both_numbers() -> None:
    assert few_rows(256, 2048) is few_rows(2048, 256) is None
    text = few_rows(255, 2048)
    assert text is not None and "255" in text and "2048" in text and "256 or more" in text
