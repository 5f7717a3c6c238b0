"""What the cutoff drops where B is near D: the gradient against the released code's, by cutoff."""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.measured import Column, Runs, Values
from bench.reference import svd_loss
from rdm_fast import FilterConfig, spectral_loss
from rdm_fast.config.recipes import RECIPES
from rdm_fast.data import build_loader, load
from rdm_fast.methods import build_method

WEAKEST, CUTOFFS = "10⁴ s_n / s₁", {"c = 10⁻³": 1e-3, "10⁻⁴": 1e-4, "10⁻⁶": 1e-6}
CUTOFF = {WEAKEST: Column(1, 0.1, 0.05)} | {c: Column(4, 0.002, 0.02) for c in CUTOFFS}
CUT = {
    "target s⁻¹": FilterConfig(location="target", sigma=-1, engine="eigh"),
    "online s^-0.5": FilterConfig(sigma=-0.5, engine="eigh"),
}


def measure_cutoff(runs: Runs, quick: bool) -> Values:
    """Cosine between the gradient and that of the released formulas in float64, by cutoff.

    Of float32 projections of two views, 256 x 256: the worst of three Gaussian batches, and those
    of CIFAR-10 by an untrained model where RDM_CIFAR10_NPZ names the images.
    """
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    batches = {"Gaussian": [torch.randn(2, 256, 256, generator=g) for g in seeds]}
    if path := os.environ.get("RDM_CIFAR10_NPZ"):
        batches["`cifar10_rdm_byol` at initialization"] = [untrained_projections(path)]
    warnings.filterwarnings("ignore", message="filter.location")  # online s^-0.5 is no advice
    values: Values = {}
    for batch, found in batches.items():
        ends = [torch.linalg.svdvals(z.double())[:, [0, -1]] for z in found]
        weakest = 1e4 * min(float((s[:, 1] / s[:, 0]).min()) for s in ends)
        for name, config in CUT.items():
            row = {c: [min(agreement(z, replace(config, cutoff=x)) for z in found)]
                   for c, x in CUTOFFS.items()}  # fmt: skip
            values[f"{batch}, {name}"] = {WEAKEST: [weakest]} | row
    return values


def agreement(views: Tensor, config: FilterConfig) -> float:
    """Cosine between the gradients of `spectral_loss` and of the released code, of [2, B, D]."""

    def gradient(loss: Callable[[Tensor, Tensor, FilterConfig], Tensor], z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        (found,) = torch.autograd.grad(loss(z[0], z[1], config), z)
        return found.double().flatten()

    ours, exact = gradient(spectral_loss, views), gradient(svd_loss, views.double())
    return float(torch.cosine_similarity(ours, exact, dim=0))


def untrained_projections(path: str) -> Tensor:
    """[2, 256, 256] of the first batch of `cifar10_rdm_byol`, from a packed .npz of images."""
    recipe = RECIPES["cifar10_rdm_byol"]()
    config = replace(recipe, data=replace(recipe.data, name="arrays", root=path))
    torch.manual_seed(config.seed)
    images, cpu = load(config.data, "train"), torch.device("cpu")
    loader = build_loader(config, images, rank=0, world_size=1, device=cpu)
    views = next(iter(loader.epoch(0, 0))).views
    with torch.no_grad():
        return build_method(config).branches(*views).projection.float()
