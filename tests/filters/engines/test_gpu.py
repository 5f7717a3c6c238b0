"""The whole filtered loss on a GPU: nothing waits, and a captured step is the same step."""

import pytest
import torch
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.filters.engines import choice
from rdm_fast.filters.loss import spectral_loss
from tests.spectra import ONLINE, TARGET, Shape, name, two_views
from tests.spies import nothing_waits

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:filter.location")]

FILTERS = [*ONLINE, FilterConfig(sigma=-0.5), TARGET[0], TARGET[2]]
ALL = pytest.mark.parametrize("config", FILTERS, ids=name)
SIDES = pytest.mark.parametrize("shape", [(64, 256), (256, 64)], ids=str)
DEVICE = torch.device("cuda")


def views(shape: Shape) -> list[Tensor]:
    return [z.to(DEVICE).requires_grad_() for z in two_views(*shape, "k^-1/2", torch.bfloat16)]


def step(z: list[Tensor], config: FilterConfig) -> list[Tensor]:
    loss = spectral_loss(z[0], z[1], config)
    return [loss, *torch.autograd.grad(loss, z)]


@ALL
@SIDES
def test_forward_and_backward_wait_for_nothing(config: FilterConfig, shape: Shape) -> None:
    assert choice.choose(config, DEVICE) == "gemm"
    z = views(shape)
    step(z, config)  # compiles, and copies constants
    with nothing_waits():
        step(z, config)


@ALL
@SIDES
def test_a_captured_graph_replays_the_eager_bits(config: FilterConfig, shape: Shape) -> None:
    z = views(shape)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(z, config)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = step(z, config)
    with torch.no_grad():
        for view in z:
            view.copy_(view.flip(0))  # other values than those that were captured
    graph.replay()
    for found, expected in zip(captured, step(z, config), strict=True):
        assert torch.equal(found, expected)
