"""Does the filter disappear in the step? The filtered loss, forward and backward of both views.

    auto, gemm, eigh   rdm_fast.spectral_loss with this engine
    gram_eigh          an eigendecomposition of the smaller Gram matrix
    compiled           gram_eigh under torch.compile
    reference          the paper's released code as filter.engine=reference repeats it
    svd                the paper's formulation

An implementation runs with every filter of a shape before the next one, the slow ones last.

Before it is timed, each implementation's gradient is compared with the float64 gradient of its own
definition (`bench.exact`).
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import chosen
from bench.exact import Definition, exact, spectra, views
from bench.reference import gram_eigh_loss, svd_loss
from bench.rows import SMALL as SMALLEST
from rdm_fast import FilterConfig, spectral_loss
from rdm_fast.filters.engines.choice import choose

pytestmark = pytest.mark.filterwarnings("ignore:filter.location")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32  # what autocast hands to the loss

# (global batch, projection width): SimSiam's on ImageNet, BYOL's and SimSiam's CIFAR recipes, and
# larger batches, up to where the features become the smaller side. The most important come first.
SMALL = [(32, 64), (64, 32)]
CPU = [(256, 2048), (256, 256)]
CUDA = [(512, 2048), *CPU, (1024, 2048)]
LARGE = [(2048, 2048), (4096, 2048), (4096, 8192)]

FILTERS = {
    **{f"online{sigma:g}": FilterConfig(sigma=sigma) for sigma in (1, 2, 0.5, -0.5, -1)},
    **{f"online-{kind}": FilterConfig(kind=kind) for kind in ("log", "log_1", "log_2")},
    **{f"target{sigma:g}": FilterConfig(location="target", sigma=sigma) for sigma in (-1, -0.5)},
}
if SMALLEST:
    FILTERS = {name: FILTERS[name] for name in ("online1", "target-1")}
ENGINES = ["auto", "gemm", "eigh", "reference"]
OPPONENTS = {"gram_eigh": gram_eigh_loss, "compiled": gram_eigh_loss, "svd": svd_loss}
NAMES = [*ENGINES[:3], "gram_eigh", "compiled", "reference", "svd"]
Loss = Callable[[Tensor, Tensor, FilterConfig], Tensor]

# From this smaller side on, an implementation is slow and its time independent of g, so that
# ONE_OF_EACH stands for all filters.
ONE_OF_EACH = ["online1", "target-1"]
SLOW = {"svd": 512, "reference": 512, "gram_eigh": 4096, "eigh": 4096}
COMPILED = [(512, 2048), (256, 2048), (2048, 2048)]  # half a minute of compilation each

# Least cosine of a gradient with the exact one of its definition. In float32 (gram_eigh) directions
# just above the cutoff have only a few correct digits.
AGREEMENT = {"gram_eigh": 0.995, "compiled": 0.995, "gemm": 0.99, "eigh": 0.9999}
LOSS_ERROR = 0.02


def is_timed(name: str, filtered: str, shape: tuple[int, int]) -> bool:
    if name == "compiled":
        return GPU and filtered in ONE_OF_EACH and shape in COMPILED
    if name == "gemm" and FILTERS[filtered].why_not_gemm:
        return False
    return min(shape) < SLOW.get(name, max(shape) + 1) or filtered in ONE_OF_EACH


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize(
        ("name", "case"),
        [
            (name, f"{B}x{D} {filtered}")
            for B, D in chosen(metafunc.config, SMALL, CUDA + LARGE if GPU else CPU)
            for name in NAMES
            for filtered in FILTERS
            if is_timed(name, filtered, (B, D))
        ],
    )


def gradient(loss: Loss, z1: Tensor, z2: Tensor, config: FilterConfig) -> tuple[Tensor, Tensor]:
    """The loss and its gradient for (z1, z2), [2 B D], both in float64."""
    value = loss(z1, z2, config)
    gradients = torch.autograd.grad(value, (z1, z2))
    return value.detach().double(), torch.stack(gradients).flatten().double()


def check(name: str, loss: Loss, z1: Tensor, z2: Tensor, config: FilterConfig) -> None:
    """Assert that loss and gradient are those of the implementation's definition."""
    engine = choose(config, z1.device) if name == "auto" else name
    definition: Definition = "damped" if engine == "gemm" else "cutoff"
    value, found = gradient(loss, z1, z2, config)
    both = spectra(*z1.shape, z1.device, z1.dtype)
    exact_value, expected = exact(config, z1, z2, definition, both)
    error = abs(float(value - exact_value))
    assert error <= LOSS_ERROR, f"{name}'s loss is wrong by {error:.1e}"
    least = AGREEMENT.get(engine, without_cutoff(config, min(z1.shape)))
    agreement = float(F.cosine_similarity(found, expected, dim=0))
    assert agreement >= least, f"{name}'s gradient is wrong: cosine {agreement:.5f}"


def without_cutoff(config: FilterConfig, n: int) -> float:
    """Least cosine of the paper's gradient with one that omits directions of rounding error.

    Features are centered, so at least one of n directions is rounding error. Under a falling online
    filter it makes most of the gradient, so nothing can be asked; from targets of sigma -1 it has
    a share of 1 / n.
    """
    is_noise = config.location == "online" and (config.kind == "log" or config.is_falling)
    return -1.0 if is_noise else 1 - 4 / n


def bench_forward_backward(measure: Callable[..., None], name: str, case: str) -> None:
    size, filtered = case.split()
    B, D = map(int, size.split("x"))
    z1, z2 = views(B, D, DEVICE, DTYPE)
    loss: Loss = spectral_loss
    config = FILTERS[filtered]
    if name in ENGINES:
        config = replace(config, engine=name)
    else:
        loss = OPPONENTS[name]
    if name == "compiled":
        torch._dynamo.reset()
        loss = torch.compile(loss)
    check(name, loss, z1, z2, config)

    # The minimum for any method: a Gram matrix of both views, half of it mirrored, and one product
    # with the rows per view, or two on the feature side.
    flops = 8 * B * B * D if B <= D else 10 * B * D * D
    measure(
        lambda: torch.autograd.grad(loss(z1, z2, config), (z1, z2)),
        bytes_moved=2 * 2 * B * D * z1.element_size(),
        flops={"bf16" if GPU else "fp32": flops},
        capturable=name in ENGINES and choose(config, z1.device) == "gemm",
    )
