"""spectrum against numpy, the definition of effective rank, and the filtered rows."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.runtime.distributed import rank, world_size
from rdm_fast.spectrum import (
    branch_spectra,
    channel_std,
    effective_rank,
    eigenvalues,
    filtered_eigenvalues,
    rank_difference,
)
from tests.ranks import run_ranks
from tests.spectra import (
    SHAPES,
    SPECTRA,
    name,
    paper_filter,
    spectrum,
    two_views,
    with_spectrum,
)
from tests.thinned import in_turn

CONFIGS = [
    *(FilterConfig(sigma=sigma) for sigma in (1.0, 2.0)),
    *(FilterConfig(kind=kind) for kind in ("log", "log_1", "log_2")),
    *(FilterConfig(location="target", sigma=sigma) for sigma in (-1.0, -0.5, 0.0)),
]
ONLINE_BASIS = [replace(config, basis="online") for config in CONFIGS[-3:]]
# float32 rows of norm s carry 6e-8 of it, eigenvalues twice that; sums are in float64
ROUNDED = 1e-6


def definition(values: list[float]) -> float:
    """exp of the entropy of the normalized eigenvalues (Roy & Vetterli), literally."""
    shares = [value / sum(values) for value in values if value > 0]
    return math.exp(-sum(share * math.log(share) for share in shares))


def numpy_eigenvalues(z: Tensor) -> np.ndarray:
    """Of Z^T Z / B, all D of them, ascending."""
    Z = z.double().numpy()
    return np.linalg.eigvalsh(Z.T @ Z / len(Z))


@settings(max_examples=50)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=20).filter(any),
    st.floats(1e-100, 1e100),
)
def test_effective_rank_is_its_definition_at_any_scale(values: list[float], scale: float) -> None:
    """Negative values are rounding errors."""
    plain = torch.tensor([*values, -1e-12], dtype=torch.float64)
    for each in (plain, scale * plain, plain.flip(0)):
        found = float(effective_rank(each))
        assert found == pytest.approx(definition(values), rel=1e-12)
        assert 1 - 1e-12 <= found <= len(values) * (1 + 1e-12)


def test_n_equal_directions_count_n_and_none_count_zero() -> None:
    stacked = torch.tensor([[0.4, 0.4], [1.0, 0.0], [0.0, 0.0]])  # leading dimensions stay
    torch.testing.assert_close(effective_rank(stacked), torch.tensor([2.0, 1.0, 0.0]))


@pytest.mark.parametrize("shape", [*SHAPES, (1, 8), (8, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, *SPECTRA], ids=str)
def test_eigenvalues_equal_numpy_s(shape: tuple[int, int], kind: torch.dtype | str) -> None:
    """They are not centered, and those that are left out for B < D are zero."""
    if isinstance(kind, str):
        z = with_spectrum(*shape, spectrum(kind, min(shape)))
    else:
        z = (torch.randn(shape, dtype=torch.float64) + 1).to(kind)
    found, expected = eigenvalues(z), numpy_eigenvalues(z)
    n = min(shape)
    assert found.shape == (n,) and found.dtype == torch.float64
    tolerance = expected[-1] * 1e-13
    np.testing.assert_allclose(found.numpy(), expected[-n:], rtol=0, atol=tolerance)
    np.testing.assert_allclose(expected[:-n], 0, atol=1e-13 * expected[-1])
    assert (found.diff() >= 0).all() and (found >= 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eigenvalues_are_nan_if_the_batch_is_not_finite(shape: tuple[int, int], bad: float) -> None:
    z = torch.randn(shape)
    z[2, 3] = bad
    assert eigenvalues(z).isnan().all() and eigenvalues(z).shape == (min(shape),)
    assert filtered_eigenvalues(z, FilterConfig()).isnan().any()
    assert effective_rank(eigenvalues(z)).isnan()


def paper_rows(z: Tensor, config: FilterConfig, basis: Tensor | None = None) -> Tensor:
    """z W with the paper's W, scaled like ours: poly uses s / s_max."""
    X = z if basis is None else basis
    W = paper_filter(X, config)
    if config.kind == "poly":
        wide = X.double() - X.double().mean(dim=0) if config.center else X.double()
        W = W / float(torch.linalg.matrix_norm(wide, 2)) ** config.sigma
    return z.double() @ W


@pytest.mark.parametrize(
    ("config", "kind", "shape", "center"),
    in_turn(
        2,
        CONFIGS + ONLINE_BASIS,
        ["flat", "k^-1/2", "rank 8", "straddling"],
        SHAPES,
        [False, True],
    ),
    ids=name,
)
def test_filtered_eigenvalues_are_those_of_the_filtered_rows(
    config: FilterConfig, kind: str, shape: tuple[int, int], center: bool
) -> None:
    z, p = two_views(*shape, kind)
    z, p = z + 0.1, p - 0.2
    config = replace(config, center=center)
    basis = p if config.basis == "online" else None
    found = filtered_eigenvalues(z, config, basis).sort().values
    expected = numpy_eigenvalues(paper_rows(z, config, basis))[-len(found) :]
    assert found.shape == (min(shape),) and (found >= 0).all()
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=ROUNDED * expected[-1])


@pytest.mark.parametrize(
    "config",
    [
        *(FilterConfig(kind=kind) for kind in ("poly", "log_1", "log_2")),
        *(FilterConfig(location="target", sigma=sigma) for sigma in (-1.0, -0.5, -0.3)),
    ],
    ids=name,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank_difference_is_positive_for_rdm(config: FilterConfig, shape: tuple[int, int]) -> None:
    """A rising g on the online branch, or a falling one on the target; elsewhere it is negative."""
    z, _ = two_views(*shape, "k^-1/2", torch.float64)
    filtered = paper_rows(z, config)
    if config.location == "online":
        assert rank_difference(filtered, z) > 0.5 > 0 > rank_difference(z, filtered)
    else:
        assert rank_difference(z, filtered) > 0.5 > 0 > rank_difference(filtered, z)


def test_rank_difference_is_the_target_s_minus_the_online_s() -> None:
    online, target = with_spectrum(8, 8, torch.tensor([1.0] * 2 + [0.0] * 6)), torch.eye(8)
    assert float(rank_difference(online, target)) == pytest.approx(8 - 2)


def test_channel_std_is_zero_when_all_rows_are_alike_and_about_one_on_the_sphere() -> None:
    row = torch.randn(1, 64)
    assert float(channel_std(row.expand(32, 64))) == pytest.approx(0, abs=1e-6)
    assert float(channel_std(row * torch.rand(32, 1) + 1e-3 * row)) == pytest.approx(0, abs=1e-5)
    filled = torch.randn(2000, 64) * torch.rand(2000, 1).clamp_min(0.1)  # of any length
    assert float(channel_std(filled)) == pytest.approx(1, abs=0.01)


# ---- both branches, one rank or two -----------------------------------------------------------


def branches() -> tuple[Tensor, Tensor, Tensor]:
    online = torch.stack(two_views(24, 40, "k^-1/2"))
    target = torch.stack(two_views(24, 40, "flat")).flip(0)
    projection = torch.stack(two_views(24, 40, "k^-1"))
    return online, target, projection


BRANCH_CONFIGS: list[FilterConfig | None] = [
    None,
    FilterConfig(),
    FilterConfig(location="target", sigma=-0.5),
    FilterConfig(location="target", sigma=-0.5, basis="online"),
    FilterConfig(location="target", sigma=-2.0),  # turns the order of the eigenvalues round
]


@pytest.mark.parametrize(
    "config", BRANCH_CONFIGS, ids=lambda c: c and f"{c.location}-{c.basis}{c.sigma:g}"
)
def test_branch_spectra_are_means_over_views_of_each_output(config: FilterConfig | None) -> None:
    online, target, projection = branches()
    found = branch_spectra(online, target, projection, config)

    outputs = {"online": list(online), "target": list(target), "projection": list(projection)}
    if config is not None:
        basis = list(online) if config.basis == "online" else [None, None]
        rows = outputs[config.location]
        outputs[config.location] = [
            paper_rows(z, config, p) for z, p in zip(rows, basis, strict=True)
        ]
    metrics = found.metrics()
    for branch, views in outputs.items():
        expected = np.mean([numpy_eigenvalues(view)[-24:] for view in views], axis=0)
        np.testing.assert_allclose(getattr(found, branch), expected, atol=ROUNDED * expected[-1])
        assert metrics[f"effective_rank/{branch}"] == pytest.approx(
            definition(list(expected.clip(0))), rel=1e-4
        )
    difference = metrics["effective_rank/target"] - metrics["effective_rank/online"]
    assert metrics["rank_difference"] == pytest.approx(difference)
    rows = projection.flatten(0, 1)
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert metrics["std"] == pytest.approx(float(unit.std(dim=0).mean()) * math.sqrt(40), rel=1e-5)


def all_branch_spectra() -> list[Tensor]:
    """With every configuration, from this rank's rows."""
    rows = [x.chunk(world_size(), dim=1)[rank()] for x in branches()]
    found = [branch_spectra(*rows, config) for config in BRANCH_CONFIGS]
    return [x for each in found for x in (each.online, each.target, each.projection, each.std)]


def test_two_ranks_have_the_spectra_of_one(tmp_path: Path) -> None:
    """Eigenvalues do not depend on the order of rows; sums over them do, to the last bits."""
    for found in run_ranks(2, all_branch_spectra, tmp_path=tmp_path):
        for each, single in zip(found, all_branch_spectra(), strict=True):
            torch.testing.assert_close(each, single, rtol=1e-6, atol=1e-9 * float(single.max()))


def test_measuring_carries_no_gradient() -> None:
    online, target, projection = (x.requires_grad_() for x in branches())
    found = branch_spectra(online, target, projection, FilterConfig())
    assert not any(x.requires_grad for x in (found.online, found.target, found.std))
