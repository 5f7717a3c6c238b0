"""Directions, measured responses and alignment, against filters and maps that are known."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.spectrum import (
    alignment,
    attainable_rank,
    branch_spectra,
    directions,
    filtered_rows,
    measured_response,
)
from rdm_fast.spectrum.branches import OncePerBatch
from tests.spectra import SHAPES, Shape, g, spectrum, two_views, with_spectrum


def rows(shape: Shape, kind: str = "k^-1/2") -> Tensor:
    return with_spectrum(*shape, spectrum(kind, min(shape)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_directions_are_right_singular_vectors(shape: Shape, dtype: torch.dtype) -> None:
    z = rows(shape).to(dtype)
    found = directions(z)
    _, s, Vh = torch.linalg.svd(z.double(), full_matrices=False)
    torch.testing.assert_close(found.s, s, rtol=0, atol=1e-9 * float(s[0]))
    overlap = (Vh @ found.V).abs()  # either sign; the spectrum has gaps
    torch.testing.assert_close(overlap, torch.eye(len(s)).double(), rtol=0, atol=1e-6)
    assert found.kept.all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_directions_under_the_cutoff_are_zero(shape: Shape) -> None:
    found = directions(rows(shape, "straddling"))
    n = min(shape)
    assert found.kept.tolist() == [True] * (n // 2) + [False] * (n - n // 2)
    assert (found.V[:, n // 2 :] == 0).all() and found.s.shape == (n,)


FALLING = FilterConfig(sigma=-0.5, location="target")
FILTERS = [FilterConfig(), FALLING, FilterConfig(kind="log"), FilterConfig(kind="log_2")]


@pytest.mark.parametrize("config", FILTERS, ids=lambda c: f"{c.kind}{c.sigma:g}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_response_of_a_filter_is_its_g(shape: Shape, config: FilterConfig) -> None:
    z = rows(shape)
    s = directions(z).s
    expected = g(config, s / s[0] if config.kind == "poly" else s)
    found = measured_response(z, filtered_rows(z, config))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # log 1 is 0


def test_the_measured_response_of_a_linear_map_is_its_diagonal_in_those_directions() -> None:
    z, A = rows((64, 24)), torch.randn(24, 24, dtype=torch.float64)
    V = directions(z).V
    expected = torch.einsum("di,de,ei->i", V, A, V)
    torch.testing.assert_close(measured_response(z, z @ A), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_there_is_no_response_under_the_cutoff_or_of_a_batch_that_is_not_finite(bad: float) -> None:
    z = rows((24, 64), "straddling")
    assert measured_response(z, z).isnan().tolist() == [False] * 12 + [True] * 12
    z[3, 4] = bad
    assert measured_response(z, z).isnan().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_branch_is_aligned_with_itself_and_its_filtered_rows(shape: Shape) -> None:
    z = rows(shape)
    axes = directions(z)
    for online in (z, filtered_rows(z, FilterConfig()), filtered_rows(z, FALLING)):
        assert float(alignment(online, axes)) == pytest.approx(1, abs=1e-9)


def test_alignment_is_the_mean_cosine_over_the_directions_that_carry_the_variance() -> None:
    """mean_i cos(C v_i, v_i), literally; the last directions carry under a ten-thousandth."""
    s = torch.tensor([3.0, 2.0, 1.0, 0.01, 0.008]).double()
    z, p = with_spectrum(40, 5, s), with_spectrum(40, 5, s.flip(0) + 1, seed=3)
    V = torch.linalg.svd(z, full_matrices=False).Vh[:3]
    C = p.mT @ p / len(p)
    cosines = [torch.cosine_similarity(C @ v, v, dim=0) for v in V]
    assert float(alignment(p, directions(z))) == pytest.approx(float(sum(cosines)) / 3, abs=1e-9)


def test_branches_that_share_no_direction_are_not_aligned() -> None:
    z, p = torch.zeros(30, 20).double(), torch.zeros(30, 20).double()
    z[:, :10], p[:, 10:] = rows((30, 10)), rows((30, 10))
    assert float(alignment(p, directions(z))) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 768), (4, 768), (2000, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_that_sum_to_zero_show_one_less(shape: Shape, dtype: torch.dtype) -> None:
    B, d = shape
    z = torch.randn(shape, dtype=torch.float64)
    norm = torch.nn.BatchNorm1d(d, affine=False, dtype=torch.float64)
    assert int(attainable_rank((z + 0.5).to(dtype))) == min(B, d)
    assert int(attainable_rank(norm(z).to(dtype))) == min(B - 1, d)


def test_a_profile_adds_the_alignment_of_the_outputs_view_by_view() -> None:
    online, target = torch.stack(two_views(24, 40, "k^-1/2")), torch.randn(2, 24, 40)
    for config in (None, FilterConfig(sigma=2.0), FALLING):
        plain = branch_spectra(online, target, online, config).metrics()
        full = branch_spectra(online, target, online, config, profile=True).metrics()
        filtered = config is not None and config.location == "online"
        outputs = [filtered_rows(p, config) if filtered else p for p in online]  # type: ignore[arg-type]
        each = [alignment(p, directions(z)) for p, z in zip(outputs, target, strict=True)]
        expected = plain | {"alignment": float(sum(each)) / 2}
        assert full == pytest.approx(expected, rel=1e-6)


def test_a_learned_predictors_profile_is_measured_on_its_projections() -> None:
    projection = torch.stack([rows((48, 16)), rows((48, 16), "k^-1")])
    made = torch.stack([filtered_rows(z, FilterConfig(kind="log_1")) for z in projection])
    found = branch_spectra(made, projection.flip(0), projection, None, profile=True).profile
    assert found is not None
    s = torch.stack([directions(z).s for z in projection])
    torch.testing.assert_close(found.s, s.mean(dim=0), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.response, s.log1p().mean(dim=0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("basis", ["own", "online"])
def test_the_profile_of_a_target_filter_is_that_of_the_targets(basis: str) -> None:
    online, target = torch.stack(two_views(24, 40, "k^-1/2")), torch.randn(2, 24, 40)
    config = FilterConfig(location="target", sigma=-0.5, basis=basis)  # type: ignore[arg-type]
    profile = branch_spectra(online, target, online, config, profile=True).profile
    assert profile is not None
    expected = torch.stack([directions(z).s for z in target]).mean(dim=0)
    torch.testing.assert_close(profile.s, expected)
    correlation = spearmanr(profile.s, profile.response).statistic
    assert correlation < -0.99 if basis == "own" else abs(correlation) < 0.9


def test_equal_batches_are_decomposed_once() -> None:
    """In SimSiam with a spectral filter two decompositions do for six."""
    seen: list[Tensor] = []
    once = OncePerBatch(lambda z: seen.append(z) or z.sum())  # type: ignore[func-returns-value]
    z1, z2 = torch.randn(2, 5, 3)
    assert [float(once(z)) for z in (z1, z2, z2.clone(), z1.clone())] == [
        float(z.sum()) for z in (z1, z2, z2, z1)
    ]
    assert len(seen) == 2


def test_a_record_has_every_array_largest_first_and_as_long_as_the_batch_can_show() -> None:
    online = torch.stack(two_views(24, 40, "straddling"))
    record = branch_spectra(
        online, online.flip(0), online, FilterConfig(location="target", sigma=-1.0), profile=True
    ).record()
    response = record.pop("response")
    assert isinstance(record.pop("alignment"), float)
    for name in ("online", "target", "projection", "s"):
        values = record[name]
        assert values.shape == (24,) and (values[:-1] >= values[1:]).all(), name
    shown = ~torch.from_numpy(response).isnan()
    assert 8 < int(shown.sum()) < 24 and shown[0]
    assert (response[shown][1:] >= response[shown][:-1]).all()
