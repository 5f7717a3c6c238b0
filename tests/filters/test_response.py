"""response against the formulas g(s) in Python floats, and what RDM says of them."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.filters.response import advice, cutoff, response, trend, unit_roundoff
from rdm_fast.spectrum import effective_rank

KINDS = [FilterConfig(kind=kind) for kind in ("log", "log_1", "log_2")]
POLY = [FilterConfig(sigma=sigma) for sigma in (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)]
spectra = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12)


def g(config: FilterConfig, s: float) -> float:
    """The formulas of the table in the module's docstring."""
    match config.kind:
        case "poly":
            return s**config.sigma
        case "log":
            return math.log(s)
        case "log_1":
            return math.log(1 + s)
        case _:
            return math.log(1 + s * s)


def column(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def tau(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


# ---- the response -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", KINDS, ids=lambda c: c.kind)
@given(values=spectra)
def test_log_kinds_are_their_formula(config: FilterConfig, values: list[float]) -> None:
    found = response(config, column(values), tau(0.0))[0]
    for each, s in zip(found.tolist(), values, strict=True):
        assert each == pytest.approx(g(config, s), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("config", POLY, ids=lambda c: f"sigma {c.sigma:g}")
@given(values=spectra)
def test_poly_is_its_formula_up_to_one_factor(config: FilterConfig, values: list[float]) -> None:
    """The factor makes the response at the largest singular value 1."""
    found = response(config, column(values), tau(0.0))[0]
    top = g(config, max(values))
    for each, s in zip(found.tolist(), values, strict=True):
        assert each == pytest.approx(g(config, s) / top, rel=1e-12)


@pytest.mark.parametrize("config", POLY, ids=lambda c: f"sigma {c.sigma:g}")
@given(values=spectra, scale=st.floats(1e-6, 1e6))
def test_poly_ignores_the_scale_of_the_batch(
    config: FilterConfig, values: list[float], scale: float
) -> None:
    s = column(values)
    torch.testing.assert_close(
        response(config, s * scale, tau(0.0)), response(config, s, tau(0.0)), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("config", POLY, ids=lambda c: f"sigma {c.sigma:g}")
def test_poly_is_one_at_the_largest_value_that_is_kept_at_every_scale(config: FilterConfig) -> None:
    for scale in (1e-6, 1.0, 1e6):
        s = scale * column([0.0, 1e-5, 0.1, 0.5])
        assert response(config, s, tau(scale * 1e-3))[0, 3] == 1.0


@pytest.mark.parametrize("config", KINDS, ids=lambda c: c.kind)
def test_log_kinds_depend_on_the_scale_of_the_batch(config: FilterConfig) -> None:
    s = column([1.5, 30.0])
    small, large = response(config, s, tau(0.0))[0], response(config, 10 * s, tau(0.0))[0]
    assert abs(small[0] / small[1] - large[0] / large[1]) > 0.05


@pytest.mark.parametrize("config", POLY + KINDS, ids=lambda c: f"{c.kind} {c.sigma:g}")
def test_what_is_not_above_tau_is_cut_off_and_the_rest_untouched(config: FilterConfig) -> None:
    s = column([0.0, 1e-300, 0.2, math.nextafter(0.2, 1), 3.0])
    found = response(config, s, tau(0.2))[0]
    assert found[:3].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(found[3:], response(config, s[:, 3:], tau(0.0))[0])
    assert (found[3:] != 0).all()


@pytest.mark.parametrize("config", POLY + KINDS, ids=lambda c: f"{c.kind} {c.sigma:g}")
@pytest.mark.parametrize("values", [[0.0, 0.0], [-1e-9, 0.0, 2.0], [1e-200, 1e200], [1.0]])
def test_the_response_is_finite_for_every_finite_spectrum(
    config: FilterConfig, values: list[float]
) -> None:
    s = column(values)
    threshold = cutoff(s, samples=4, features=4, dtype=torch.float32, relative=1e-3)
    found = response(config, s, threshold)
    if not (config.kind == "log_2" and max(values) > 1e150):  # s^2 is out of range
        assert found.isfinite().all()
    assert (found[s <= 0] == 0).all()


@pytest.mark.parametrize("config", POLY + KINDS, ids=lambda c: f"{c.kind} {c.sigma:g}")
def test_views_are_filtered_apart(config: FilterConfig) -> None:
    one, other = column([0.5, 2.0, 4.0]), column([1e-5, 7.0, 100.0])
    thresholds = torch.tensor([[0.0], [1e-3]], dtype=torch.float64)
    both = response(config, torch.cat([one, other]), thresholds)
    torch.testing.assert_close(both[0], response(config, one, tau(0.0))[0])
    torch.testing.assert_close(both[1], response(config, other, tau(1e-3))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_response_has_the_dtype_of_the_spectrum(dtype: torch.dtype) -> None:
    assert response(FilterConfig(), column([1.0, 2.0]).to(dtype), tau(0.0).to(dtype)).dtype == dtype


# ---- the cutoff -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "u"),
    [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-24)],
    ids=str,
)
def test_unit_roundoff_bounds_the_relative_error_of_one_rounding(
    dtype: torch.dtype, u: float
) -> None:
    assert unit_roundoff(dtype) == u
    x = torch.linspace(1, 2, 10_001, dtype=torch.float64)
    error = ((x.to(dtype).double() - x) / x).abs().max()
    assert u / 1.1 < error <= u


@given(values=spectra, relative=st.floats(1e-6, 0.5))
def test_the_cutoff_is_the_larger_of_its_two_terms(values: list[float], relative: float) -> None:
    samples, features = 6, 20
    for dtype, u in ((torch.bfloat16, 2**-8), (torch.float32, 2**-24)):
        found = cutoff(
            column(values), samples=samples, features=features, dtype=dtype, relative=relative
        )
        rms = math.sqrt(sum(s * s for s in values) / (samples * features))
        noise = 0.75 * u * rms * (math.sqrt(samples) + math.sqrt(features))
        assert found.shape == (1, 1)
        assert found.item() == pytest.approx(max(relative * max(values), noise), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("B", "D"), [(64, 64), (64, 256), (256, 64)])
def test_the_cutoff_is_above_the_rounding_noise_of_the_projections(
    dtype: torch.dtype, B: int, D: int
) -> None:
    """And not more than three times above it: a random matrix, rounded, minus itself."""
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
        *((FilterConfig(sigma=sigma), "rising") for sigma in (1e-3, 0.5, 1.0, 2.0)),
        *((FilterConfig(sigma=sigma), "falling") for sigma in (-1e-3, -0.5, -1.0, -2.0)),
        (FilterConfig(sigma=0.0), "flat"),
        *((replace(config, sigma=sigma), "rising") for config in KINDS for sigma in (-1.0, 0.0)),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.kind} {x.sigma:g}",
)
def test_trend_says_how_the_response_moves(config: FilterConfig, expected: str) -> None:
    assert trend(config) == expected
    found = response(config, column([1.5, 2.0, 3.0, 9.0]), tau(0.0))[0].diff()
    sign = {"rising": 1, "falling": -1, "flat": 0}[expected]
    assert (found.sign() == sign).all()


@pytest.mark.parametrize("location", ["online", "target"])
@pytest.mark.parametrize("config", POLY + KINDS, ids=lambda c: f"{c.kind} {c.sigma:g}")
def test_advice_is_given_exactly_for_a_filter_on_the_wrong_branch(
    config: FilterConfig, location: str
) -> None:
    placed = replace(config, location=location)  # type: ignore[arg-type]
    wrong = {"online": "falling", "target": "rising"}[location]
    text = advice(placed)
    assert (text is not None) == (trend(config) == wrong)
    if text is not None:
        assert text.startswith(f"filter.location={location} with ")
        way_out = {"online": "filter.location=target", "target": "filter.location=online"}[location]
        assert text.endswith(f"{way_out}.") and f"a {wrong} g" in text
        named = f"sigma={config.sigma:g}" if config.kind == "poly" else f"kind={config.kind}"
        assert named in text


def ranks(config: FilterConfig, values: list[float]) -> tuple[float, float]:
    """Effective rank of the correlation before and after the filter: of s^2 and (s g(s))^2."""
    s = column(values)
    after = (s * response(config, s, tau(0.0))).square()
    return float(effective_rank(s.square())), float(effective_rank(after))


@pytest.mark.parametrize(
    "config",
    [*(FilterConfig(sigma=s) for s in (0.5, 1.0, 2.0)), *KINDS[1:]],
    ids=lambda c: f"{c.kind} {c.sigma:g}",
)
@given(values=spectra)
def test_a_rising_filter_never_raises_the_effective_rank(
    config: FilterConfig, values: list[float]
) -> None:
    """The filtered spectrum majorises the other, and entropy is Schur-concave. (log is negative
    below 1 and so rises in |g| only above.)"""
    before, after = ranks(config, values)
    assert after <= before * (1 + 1e-9)


@given(values=st.lists(st.floats(1.0, 1e3), min_size=2, max_size=12))
def test_log_never_raises_the_effective_rank_where_it_is_positive(values: list[float]) -> None:
    if max(values) > 1:  # log 1 = 0: otherwise nothing is left
        before, after = ranks(FilterConfig(kind="log"), values)
        assert after <= before * (1 + 1e-9)


@pytest.mark.parametrize("sigma", [-1.0, -0.7, -0.5, -0.3])
@given(values=spectra)
def test_a_falling_filter_down_to_whitening_never_lowers_the_effective_rank(
    sigma: float, values: list[float]
) -> None:
    before, after = ranks(FilterConfig(location="target", sigma=sigma), values)
    assert after >= before * (1 - 1e-9)
    if sigma == -1.0:
        assert after == pytest.approx(len(values), rel=1e-9)


def test_the_change_of_rank_is_strict_for_a_spectrum_that_is_not_flat() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    for config in (FilterConfig(sigma=0.5), *KINDS[1:]):
        before, after = ranks(config, values)
        assert after < 0.99 * before
    before, after = ranks(FilterConfig(sigma=-0.5), values)
    assert after > 1.01 * before
