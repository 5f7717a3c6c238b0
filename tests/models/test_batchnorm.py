"""models.batchnorm on several ranks, against nn.BatchNorm in float64 on the whole batch."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rdm_fast.models.batchnorm import CpuSyncBatchNorm, frozen_running_statistics, synchronize
from tests.ranks import run_ranks
from tests.spies import calls_of

CPU = torch.device("cpu")
# Outputs and gradients are sums of at most 672 terms, rounded at 6e-8 of the largest: in units of
# the largest value, 1e-6 leaves room for a dozen such roundings.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
CASES: dict[str, tuple[nn.Module, tuple[int, ...], int, torch.dtype]] = {
    # module, shape of the whole batch, rows on rank 0, dtype
    "images": (nn.BatchNorm2d(5), (16, 5, 6, 7), 8, torch.float32),
    "images, uneven": (nn.BatchNorm2d(5, momentum=0.3), (16, 5, 6, 7), 5, torch.float32),
    "channels last": (nn.BatchNorm2d(5), (16, 5, 6, 7), 11, torch.float32),
    "rows without affine": (nn.BatchNorm1d(5, affine=False), (12, 5), 6, torch.float32),
    "rows, one on rank 0": (nn.BatchNorm1d(5), (12, 5), 1, torch.float32),
    "sequences": (nn.BatchNorm1d(5), (7, 5, 9), 4, torch.float32),
    "cumulative average": (nn.BatchNorm1d(5, momentum=None), (12, 5), 4, torch.float32),
    "no running statistics": (
        nn.BatchNorm1d(5, track_running_stats=False), (12, 5), 4, torch.float32,
    ),
    "float64": (nn.BatchNorm2d(5), (16, 5, 6, 7), 5, torch.float64),
}  # fmt: skip


def batches(name: str) -> list[tuple[Tensor, Tensor]]:
    """Two whole batches and the gradients of their outputs."""
    _, shape, _, dtype = CASES[name]
    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(2, *shape, generator=generator, dtype=dtype) + 0.5
    dy = torch.randn(2, *shape, generator=generator, dtype=dtype)
    if name == "channels last":
        return [
            (a.to(memory_format=torch.channels_last), b.to(memory_format=torch.channels_last))
            for a, b in zip(x, dy, strict=True)
        ]
    return list(zip(x, dy, strict=True))


def build(name: str) -> nn.Module:
    norm, _, _, dtype = CASES[name]
    norm = norm.to(dtype)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 1.5, 5))
            norm.bias.copy_(torch.linspace(-1, 1, 5))
    return norm


def train_two_steps(norm: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of two training steps, and one forward in eval mode."""
    seen: dict[str, Tensor] = {}
    for step, (x, dy) in enumerate(parts):
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        norm.zero_grad()
        y = norm(x)
        y.backward(dy)
        assert x.grad is not None
        seen |= {f"rows/y{step}": y.detach(), f"rows/dx{step}": x.grad}
        seen |= {f"sum/d{n}{step}": p.grad.clone() for n, p in norm.named_parameters()}
    seen |= {f"same/{n}": buffer.clone() for n, buffer in norm.named_buffers()}
    norm.eval()
    seen["rows/eval"] = norm(parts[0][0]).detach()
    return seen


def _shifted() -> Tensor:
    """Mean 1000, standard deviation 1: E[x^2] - E[x]^2 has no correct digit after the second."""
    return 1000 + torch.randn(64, 3, generator=torch.Generator().manual_seed(5))


def _on_one_rank() -> dict[str, Any]:
    rank = dist.get_rank()
    results: dict[str, Any] = {}
    for name, (_, _, first, _) in CASES.items():
        rows = slice(None, first) if rank == 0 else slice(first, None)
        parts = [(x[rows], dy[rows]) for x, dy in batches(name)]
        results[name] = seen = train_two_steps(synchronize(build(name), CPU), parts)
        if name == "channels last":
            assert seen["rows/y0"].is_contiguous(memory_format=torch.channels_last)
            assert seen["rows/dx0"].is_contiguous(memory_format=torch.channels_last)

    norm = synchronize(nn.BatchNorm1d(3), CPU)
    if rank == 0:  # eval mode waits for no other rank
        norm.eval()(torch.zeros(3, 3))
        norm.train()
    half = _shifted().chunk(2)[rank]
    with pytest.MonkeyPatch.context() as patch:
        names = ("all_gather_into_tensor", "all_reduce", "all_gather", "broadcast")
        calls = [calls_of(patch, dist, name) for name in names]
        y = norm(half.clone().requires_grad_())
        results["collectives"] = [[len(each) for each in calls]]
        y.sum().backward()
        results["collectives"].append([len(each) for each in calls])
    results["shifted var"] = norm.running_var

    cast = synchronize(nn.BatchNorm1d(3, momentum=1.0), CPU)
    x = (half - 1000).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z = cast(x)
    z.sum().backward()
    results["cast"] = [z.detach(), x.grad, cast.running_var, cast.weight.grad]
    return results


Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(2, _on_one_rank, tmp_path=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process_on_the_whole_batch(name: str, ranks: Ranks) -> None:
    parts = [(x.double(), dy.double()) for x, dy in batches(name)]
    expected = train_two_steps(build(name).double(), parts)
    dtype = CASES[name][3]
    of_rank = [results[name] for results in ranks]
    for key, value in expected.items():
        if key == "rows/eval" and name == "no running statistics":
            continue  # batch statistics of one call in eval mode: covered by rows/y0
        if key.startswith("rows/"):
            found = torch.cat([seen[key] for seen in of_rank])
        elif key.startswith("sum/"):
            found = sum(seen[key] for seen in of_rank)
        else:
            found = of_rank[0][key]
            assert torch.equal(found, of_rank[1][key]), f"ranks disagree on {key}"
        assert found.dtype == (dtype if value.is_floating_point() else value.dtype)
        # dx is a difference of terms of the size of w r dy, whatever is left of them
        atol = TOLERANCE[dtype] * value.double().abs().max().clamp_min(1).item()
        torch.testing.assert_close(found.double(), value.double(), atol=atol, rtol=0, msg=key)


def test_one_collective_forward_and_one_backward(ranks: Ranks) -> None:
    for seen in ranks:
        assert seen["collectives"] == [[1, 0, 0, 0], [1, 1, 0, 0]]


def test_variance_survives_a_large_mean(ranks: Ranks) -> None:
    expected = 0.9 * 1 + 0.1 * _shifted().double().var(0)
    # float32 rounds a mean of 1000 by 3e-5; the ranks' means differ by about 0.2, so merging them
    # is wrong by at most 0.1 (momentum) * 2 * 0.2 * 6e-5
    torch.testing.assert_close(ranks[0]["shifted var"].double(), expected, atol=3e-6, rtol=0)


def test_statistics_are_float32_under_autocast(ranks: Ranks) -> None:
    x = (_shifted() - 1000).bfloat16().double()
    expected = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    (z, grad, var, weight_grad), (other, *_) = (seen["cast"] for seen in ranks)
    assert z.dtype == grad.dtype == torch.bfloat16 and weight_grad.dtype == torch.float32
    # bfloat16 rounds to 2^-9; statistics in bfloat16 would be wrong by that much themselves
    torch.testing.assert_close(torch.cat([z, other]).double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(var.double(), x.var(0), rtol=1e-6, atol=0)


# ---- conversion and frozen statistics ------------------------------------------------------------


def _network() -> nn.Sequential:
    """With running statistics that are not those of the start."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Flatten(),
        nn.Linear(144, 6), nn.BatchNorm1d(6, affine=False),
    )  # fmt: skip
    network(torch.randn(4, 1, 8, 8))
    return network


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_synchronizing_keeps_every_parameter_buffer_and_name(device: str) -> None:
    network = _network().eval()
    before = dict(network.state_dict(keep_vars=True))
    after = synchronize(network, torch.device(device)).state_dict(keep_vars=True)
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    kind = nn.SyncBatchNorm if device == "cuda" else CpuSyncBatchNorm
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    assert len(norms) == 2 and all(type(m) is kind and not m.training for m in norms)


def test_on_one_rank_a_synchronized_network_is_bitwise_the_plain_one() -> None:
    plain, synchronized, x = _network(), _network(), torch.randn(4, 1, 8, 8)
    synchronized.load_state_dict(plain.state_dict())
    synchronize(synchronized, CPU)
    assert torch.equal(plain(x), synchronized(x))
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, synchronized.get_buffer(name)), name


@pytest.mark.parametrize("kind", ["plain", "ours", "torch's"])
def test_frozen_statistics_have_their_old_bits_afterwards(kind: str) -> None:
    network = _network()
    if kind != "plain":
        synchronize(network, torch.device("cpu" if kind == "ours" else "cuda"))
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with frozen_running_statistics(network):
        if kind == "torch's":  # runs on GPUs only; its buffers move the same way
            for buffer in network.buffers():
                buffer += 1
        else:
            network(torch.full((4, 1, 8, 8), float("nan")))
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_frozen_statistics_return_after_an_error_and_move_again_later() -> None:
    norm, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    with pytest.raises(KeyError), frozen_running_statistics(norm):
        norm(x)
        raise KeyError
    assert torch.equal(norm.running_mean, torch.zeros(3)) and norm.num_batches_tracked == 0
    norm(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(0))
    assert norm.num_batches_tracked == 1


def test_backward_may_follow_the_frozen_forward() -> None:
    norm, twin, dy = nn.BatchNorm1d(3), nn.BatchNorm1d(3), torch.randn(8, 3)
    frozen = torch.randn(8, 3, requires_grad=True)
    free = frozen.detach().clone().requires_grad_()
    with frozen_running_statistics(norm):
        y = norm(frozen)
    y.backward(dy)
    twin(free).backward(dy)
    assert torch.equal(frozen.grad, free.grad)


def test_one_axis_is_not_a_batch() -> None:
    with pytest.raises(ValueError):
        CpuSyncBatchNorm(3)(torch.zeros(3))
