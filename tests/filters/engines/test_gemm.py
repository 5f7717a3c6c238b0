"""The gemm engine against its own definition in float64: damped, not cut off (tests/spectra.py)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rdm_fast.config import FilterConfig
from rdm_fast.filters.engines.gemm import GemmFilter
from rdm_fast.filters.loss import SpectralPredictor
from tests.spectra import (
    ONLINE,
    SHAPES,
    SPECTRA,
    TARGET,
    Shape,
    damped_filter,
    gradients,
    name,
    paper_loss,
    relative,
    two_views,
)
from tests.spies import refused
from tests.thinned import in_turn

pytestmark = pytest.mark.filterwarnings("ignore:filter.location")

FALLING = [FilterConfig(sigma=s) for s in (-0.3, -0.5)]
CROSSED = [FilterConfig(location="target", sigma=-0.5, basis="online")]
DTYPES = [torch.float32, torch.bfloat16]


def least_cosine(config: FilterConfig) -> float:
    """Agreement that is promised for the direction of the gradient."""
    return 0.999 if config.is_falling else 0.9999


def loss_error(config: FilterConfig) -> float:
    """The functions of s are fitted; what falls with s amplifies the directions that fit worst, and
    the rows of another basis have more of them."""
    if config.basis == "online":
        return 6e-3
    return 2e-4 if config.is_falling else 1e-4


@pytest.mark.parametrize(
    ("config", "spectrum", "shape", "dtype"),
    in_turn(2, ONLINE + FALLING + TARGET + CROSSED, SPECTRA, SHAPES, DTYPES),
    ids=name,
)
def test_the_gradient_is_that_of_the_damped_filter(
    config: FilterConfig, spectrum: str, shape: Shape, dtype: torch.dtype
) -> None:
    """Where all rows are alike the cosine is 1 whatever they are, and the gradient only rounding:
    then it has to be small beside that of a row that is free to turn, 1 / 2B|z_i|."""
    config = replace(config, engine="gemm")
    z1, z2 = two_views(*shape, spectrum, dtype)
    loss, *grads = gradients(z1, z2, config)
    expected, *expected_grads = paper_loss(z1, z2, config, filter_of=damped_filter)
    assert abs(loss - expected) <= loss_error(config)
    for grad, expected_grad, z in zip(grads, expected_grads, (z1, z2), strict=True):
        unit = (1 / (2 * len(z) * z.double().norm(dim=1))).norm()
        if expected_grad.norm() <= 1e-2 * unit:
            assert grad.double().norm() <= 2e-2 * unit
            continue
        cosine = F.cosine_similarity(grad.double().flatten(), expected_grad.flatten(), dim=0)
        assert cosine >= (least_cosine(config) if spectrum != "rank 1" else 0.99)


@pytest.mark.parametrize(("config", "shape"), in_turn(1, ONLINE + TARGET, SHAPES), ids=name)
def test_it_agrees_with_eigh_where_nothing_is_weak(config: FilterConfig, shape: Shape) -> None:
    """Damping then changes singular values by cutoff^2 / 2; the rest is the fit."""
    z1, z2 = two_views(*shape, "flat")
    found = gradients(z1, z2, replace(config, engine="gemm"))
    expected = gradients(z1, z2, replace(config, engine="eigh"))
    assert abs(found[0] - expected[0]) <= 5e-5
    for grad, other in zip(found[1:], expected[1:], strict=True):
        assert relative(grad, other) <= (4e-3 if config.kind == "log" else 2e-3)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("config", ONLINE + FALLING + TARGET, ids=name)
def test_any_scale_gives_a_finite_and_right_gradient(config: FilterConfig, scale: float) -> None:
    config = replace(config, engine="gemm")
    z1, z2 = (scale * z for z in two_views(64, 256, "k^-1"))
    loss, *grads = gradients(z1, z2, config)
    expected, *expected_grads = paper_loss(z1, z2, config, filter_of=damped_filter)
    assert abs(loss - expected) <= loss_error(config)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        cosine = F.cosine_similarity(grad.double().flatten(), expected_grad.flatten(), dim=0)
        assert cosine >= least_cosine(config)
        assert abs(grad.double().norm() / expected_grad.norm() - 1) <= 2e-2


@pytest.mark.parametrize(
    ("config", "shape"), in_turn(1, ONLINE + FALLING + TARGET + CROSSED, SHAPES), ids=name
)
def test_zeros_or_rows_not_finite_have_finite_gradients(config: FilterConfig, shape: Shape) -> None:
    config, zeros = replace(config, engine="gemm"), torch.zeros(shape)
    loss, *grads = gradients(zeros, zeros, config)
    assert loss == 0 and not any(grad.any() for grad in grads)
    for bad in (float("nan"), float("inf")):
        z1, z2 = two_views(*shape, "flat")
        z1[3, 5] = bad
        loss, *grads = gradients(z1, z2, config)
        assert loss.isnan() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("config", [ONLINE[1], ONLINE[2], ONLINE[3], FALLING[1]], ids=name)
def test_one_stacked_product_gives_what_two_give(config: FilterConfig) -> None:
    """For views that are each other's targets; only s^2 takes both from one product."""
    z1, z2 = two_views(24, 64, "k^-1/2")
    together = gradients(z1, z2, replace(config, engine="gemm"))
    X = torch.stack([z1, z2])
    apart = GemmFilter(X, slice(0, 24), replace(config, engine="gemm"), swapped=False)
    p = X.clone().requires_grad_()
    loss = apart.cosine(p, X.flip(0)).mean()
    loss.backward()
    assert p.grad is not None
    assert abs(loss - together[0]) <= 1e-6
    assert relative(p.grad, torch.stack(together[1:])) <= 1e-4


@pytest.mark.parametrize("spectrum", ["straddling", "rank 8"])
def test_a_target_predictor_is_differentiated_as_accurately_as_an_online_one(spectrum: str) -> None:
    """dL/dz = dL/dp W uses h of weak directions, which a target alone does not."""
    config = FilterConfig(location="target", sigma=-0.5, engine="gemm")
    z, dp = two_views(24, 64, spectrum)[0].requires_grad_(), torch.randn(24, 64)
    SpectralPredictor(config)(z).backward(dp)
    assert z.grad is not None
    expected = dp.double() @ damped_filter(z.detach(), config)
    cosine = F.cosine_similarity(z.grad.double().flatten(), expected.flatten(), dim=0)
    assert cosine >= 0.999


@pytest.mark.parametrize(
    "config",
    [
        FilterConfig(center=True),
        FilterConfig(cutoff=1e-5),
        FilterConfig(sigma=-0.51),
        FilterConfig(sigma=6.5),
        FilterConfig(location="target", sigma=-1.01),
        FilterConfig(location="target", basis="online", sigma=-0.51),
    ],
    ids=str,
)
def test_filters_it_cannot_compute_are_refused_at_once(config: FilterConfig) -> None:
    with refused(ValueError, "filter.engine=gemm", "filter.engine=eigh"):
        replace(config, engine="gemm")
