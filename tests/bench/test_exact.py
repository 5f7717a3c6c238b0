"""bench.exact against the tests' own formulas and bench.reference."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from bench.exact import Definition, decompose, exact, views
from bench.reference import gram_eigh_loss, svd_loss
from rdm_fast import FilterConfig
from tests.spectra import ONLINE, TARGET, damped_filter, name, paper_filter, paper_loss, two_views

CPU = torch.device("cpu")
CONFIGS = [*ONLINE, FilterConfig(sigma=-1.0), *TARGET[:3]]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
@pytest.mark.parametrize("definition", ["cutoff", "damped"])
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_it_agrees_with_the_tests_own_formula(
    config: FilterConfig, definition: Definition, shape: tuple[int, int]
) -> None:
    filter_of = damped_filter if definition == "damped" else paper_filter
    for spectrum, dtype in product(("k^-1", "straddling"), (torch.bfloat16, torch.float32)):
        z1, z2 = two_views(*shape, spectrum, dtype)
        loss, gradient = exact(config, z1, z2, definition, (decompose(z1), decompose(z2)))
        expected, *gradients = paper_loss(z1, z2, config, filter_of=filter_of)
        assert_close(loss, expected, rtol=0, atol=1e-9)
        # an eigenvalue of a Gram matrix is good to 1e-16 of the largest: to 1e-10 at the cutoff
        assert_close(gradient, torch.stack(gradients).flatten(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", [svd_loss, gram_eigh_loss])
@pytest.mark.parametrize("config", CONFIGS[:6] + CONFIGS[7:8], ids=name)
def test_opponents_compute_the_same_if_nothing_is_cut_off(
    config: FilterConfig, loss, shape: tuple[int, int] = (40, 24)
) -> None:
    z1, z2 = (z.double().requires_grad_() for z in two_views(*shape, "k^-1/2"))
    value = loss(z1, z2, config)
    found = torch.stack(torch.autograd.grad(value, (z1, z2))).flatten()
    both = decompose(z1), decompose(z2)
    expected, gradient = exact(config, z1, z2, "cutoff", both)
    assert_close(value.detach(), expected, rtol=0, atol=1e-10)
    assert_close(found, gradient, rtol=1e-7, atol=1e-10)


def test_views_are_as_after_a_batch_norm() -> None:
    for z in views(48, 16, CPU, torch.float32):
        assert_close(z.mean(dim=0), torch.zeros(16), rtol=0, atol=1e-6)
        assert_close(z.std(dim=0), torch.ones(16))
