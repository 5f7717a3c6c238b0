"""engines.reference against the formulas of the released code, written out from the method notes.

They are those of `solo/methods/rdmsimsiam.py` and of `imagenet/main_simsiam.py`.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_fast.config import FilterConfig
from tests import spectra
from tests.spectra import SHAPES, Shape, g, gradients, relative, two_views

pytestmark = pytest.mark.filterwarnings("ignore:filter.location")

ONLINE = [replace(config, engine="reference") for config in spectra.ONLINE]
TARGET = [
    FilterConfig(location="target", sigma=sigma, engine="reference", basis=basis)
    for sigma in (-1.0, -0.7, -0.5, -0.3)
    for basis in ("own", "online")  # type: ignore[misc]
]


def released(p: Tensor, z: Tensor, config: FilterConfig, narrow: torch.dtype) -> Tensor:
    """One half of the loss; products have operands of the narrow dtype, as under autocast."""
    wide = torch.promote_types(p.dtype, torch.float32)
    B, D = p.shape
    with torch.no_grad():
        if config.location == "target" and config.basis == "own":  # CIFAR, ImageNet-100
            U, s, Vh = torch.linalg.svd(z.to(wide), full_matrices=False)
            US = U.to(narrow) @ torch.diag(s ** (1 + config.sigma)).to(narrow)
            z = US @ Vh.to(narrow)
        elif config.location == "target" and B >= D:  # ImageNet
            eigenvalues, V = torch.linalg.eigh(p.to(wide).T @ p.to(wide))
            z = z @ (V @ torch.diag(eigenvalues.sqrt() ** config.sigma) @ V.T)
        else:
            _, s, Vh = torch.linalg.svd(p.to(wide), full_matrices=False)
            W = Vh.T.to(narrow) @ torch.diag(g(config, s)).to(narrow) @ Vh.to(narrow)
            z = z if config.location == "online" else z @ W
    if config.location == "online":
        p = p @ W
    return -F.cosine_similarity(p.to(wide), z.to(wide), dim=1).mean()


def expected(z1: Tensor, z2: Tensor, config: FilterConfig) -> tuple[Tensor, ...]:
    a, b = (z.detach().clone().requires_grad_() for z in (z1, z2))
    loss = sum(released(p, z.detach(), config, z1.dtype) / 2 for p, z in ((a, b), (b, a)))
    return loss.detach(), *torch.autograd.grad(loss, (a, b))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "config", ONLINE + TARGET, ids=lambda c: f"{c.location}-{c.basis}-{c.kind}{c.sigma:g}"
)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_it_is_the_released_code(
    config: FilterConfig, shape: Shape, dtype: torch.dtype, error: float
) -> None:
    z1, z2 = two_views(*shape, "k^-1", dtype)
    for found, exact in zip(gradients(z1, z2, config), expected(z1, z2, config), strict=True):
        assert relative(found, exact) <= error


@pytest.mark.parametrize("sigma", [-1.0, -0.5])
def test_a_target_of_rank_1_is_finite_as_in_the_released_code(sigma: float) -> None:
    """U S^(1 + sigma) V^T, where z W would take 0 times infinity: all columns but one are zero."""
    z1, z2 = (torch.randn(24, 1) * torch.eye(64)[k] for k in (3, 4))
    config = FilterConfig(location="target", sigma=sigma, engine="reference")
    loss, *grads = gradients(z1, z2, config)
    exact, *exact_grads = expected(z1, z2, config)
    assert loss.isfinite() and abs(loss - exact) <= 1e-6
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert relative(grad, exact_grad) <= 1e-4


def test_negative_eigenvalues_of_imagenets_code_are_not_clamped() -> None:
    """Trap 17: B >= D, and features that have collapsed."""
    z1, z2 = two_views(256, 100, "rank 8")
    config = FilterConfig(location="target", sigma=0.5, basis="online", engine="reference")
    assert expected(z1, z2, config)[0].isnan() and gradients(z1, z2, config)[0].isnan()


@pytest.mark.parametrize("config", [*ONLINE, TARGET[0], TARGET[4]], ids=str)
def test_float16_batches_have_float16_products(config: FilterConfig) -> None:
    """Equal up to the order of sums, and well away from float32 products."""
    z1, z2 = two_views(24, 64, "k^-1/2", torch.float16)
    for found, exact, wide in zip(
        gradients(z1, z2, config)[1:],
        expected(z1, z2, config)[1:],
        expected(z1.float(), z2.float(), config)[1:],
        strict=True,
    ):
        assert relative(found, exact) <= 0.2 * relative(wide, exact)


def test_float16_overflows_as_in_the_released_code() -> None:
    """Trap 27: sigma = 2, and one direction with s > 256. Float32 batches do not."""
    z1, z2 = (1000 * z for z in two_views(24, 64, "k^-2"))
    config = FilterConfig(sigma=2.0, engine="reference")
    assert gradients(z1.half(), z2.half(), config)[0].isnan()
    assert gradients(z1, z2, config)[0].isfinite()
