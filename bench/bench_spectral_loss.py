"""Does the filter disappear in the step? The filtered loss, forward and backward of both views.

    svd        the loss as the paper's code writes it
    gram_eigh  the same by an eigendecomposition of the smaller Gram matrix
    rdm_fast   rdm_fast.spectral_loss

Each implementation's gradient is compared with that of the paper's formulation, in float64 and
with the cutoff, before it is timed.
"""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.reference import gram_eigh_loss, svd_loss
from rdm_fast import FilterConfig, spectral_loss

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32  # what autocast hands to the loss

# (global batch, projection width): BYOL's and SimSiam's CIFAR recipes, SimSiam's on ImageNet,
# and batches up to where the features become the smaller side.
SHAPES = [(256, 256), (256, 2048)]
if GPU:
    SHAPES += [(512, 2048), (1024, 2048), (2048, 2048), (4096, 2048)]

FILTERS = {
    "online-poly-1": FilterConfig(location="online", kind="poly", sigma=1.0),
    "online-log_1": FilterConfig(location="online", kind="log_1"),
    "target-poly--1": FilterConfig(location="target", kind="poly", sigma=-1.0),
}
Loss = Callable[[Tensor, Tensor, FilterConfig], Tensor]
IMPLEMENTATIONS: dict[str, Loss] = {
    "svd": svd_loss,
    "gram_eigh": gram_eigh_loss,
    "rdm_fast": spectral_loss,
}

# Cosine of a gradient with the exact one. Without a cutoff, the directions that are only rounding
# error have amplitude 1 in a target of sigma -1: a few of n, each a share 1 / n of the gradient.
AGREEMENT = {"svd": 0.98, "gram_eigh": 0.995, "rdm_fast": 0.995}


@cache
def views(B: int, D: int) -> tuple[Tensor, Tensor]:
    """Projections of two views as a projector's final batch norm leaves them, [B, D].

    Features are centred and of unit variance; the spectrum falls as k^-1 in energy; the two
    views share nine tenths of their energy.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(B, D, generator=generator)
    noise = torch.randn(2, B, D, generator=generator)
    strength = torch.arange(1, D + 1) ** -0.5
    rotation = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    z = ((0.9**0.5 * image + 0.1**0.5 * noise) * strength) @ rotation
    z = (z - z.mean(dim=1, keepdim=True)) / z.std(dim=1, keepdim=True)
    z1, z2 = z.to(DEVICE, DTYPE)
    return z1.requires_grad_(), z2.requires_grad_()


def gradient(loss: Loss, z1: Tensor, z2: Tensor, config: FilterConfig) -> Tensor:
    """d loss / d (z1, z2), [2 B D] float64."""
    return torch.stack(torch.autograd.grad(loss(z1, z2, config), (z1, z2))).flatten().double()


@cache
def exact_gradient(config: FilterConfig, B: int, D: int) -> Tensor:
    """The gradient of the paper's formulation in float64, [2 B D]."""
    z1, z2 = views(B, D)
    return gradient(partial(svd_loss, cutoff=config.cutoff), z1.double(), z2.double(), config)


@pytest.mark.parametrize(("B", "D"), SHAPES, ids=lambda size: str(size))
@pytest.mark.parametrize("filtered", FILTERS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def bench_forward_backward(
    measure: Callable[[Callable[[], object]], None], name: str, filtered: str, B: int, D: int
) -> None:
    config = FILTERS[filtered]
    z1, z2 = views(B, D)
    loss = IMPLEMENTATIONS[name]
    exact = exact_gradient(config, B, D)
    agreement = float(F.cosine_similarity(gradient(loss, z1, z2, config), exact, dim=0))
    assert agreement >= AGREEMENT[name], f"{name}'s gradient is wrong: cosine {agreement:.4f}"

    measure(lambda: torch.autograd.grad(loss(z1, z2, config), (z1, z2)))
