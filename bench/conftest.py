"""Timing rules for every benchmark: `pytest bench` on a GPU, `--benchmark-disable` elsewhere."""

import time
import timeit
from collections.abc import Callable

import pytest
import torch
import triton
from pytest_benchmark.fixture import BenchmarkFixture

ROUND_S = 0.02  # a round is long beside the clock and the one wait for the GPU that it contains
TOTAL_S = 2.0
RIVALS = ("name", "loader")  # parameters that say whose time it is


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_disable"):  # nothing is timed: leave the other cores alone
        torch.set_num_threads(1)


def synced_clock() -> float:
    """Seconds now, once the GPU is idle.

    pytest-benchmark reads its timer only at the two ends of a round and divides by the calls in
    between, so the wait is shared by the whole round: neither the launch alone (no wait) nor the
    idle gap after every call (a wait each) is what gets measured.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=synced_clock, group=group_of(item)))


def group_of(item: pytest.Item) -> str:
    """What is compared in one table: a benchmark's rivals with the same parameters otherwise."""
    callspec = getattr(item, "callspec", None)
    parameters: dict[str, object] = callspec.params if callspec else {}
    others = [f"{key}={value}" for key, value in parameters.items() if key not in RIVALS]
    return " ".join([getattr(item, "originalname", item.name), *others])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Callable[[Callable[[], object]], None]:
    """measure(fn): 5 to 30 rounds within about two seconds, after warm-up; records the machine."""

    def run(fn: Callable[[], object]) -> None:
        if benchmark.disabled:
            benchmark(fn)
            return
        once = min(timeit.repeat(fn, timer=synced_clock, number=1, repeat=4))  # warms up, too
        iterations = max(1, round(ROUND_S / once))
        rounds = min(30, max(5, round(TOTAL_S / (once * iterations))))
        benchmark.pedantic(fn, rounds=rounds, iterations=iterations)
        gpu = torch.cuda.is_available()
        benchmark.extra_info["device"] = torch.cuda.get_device_name() if gpu else "cpu"
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.extra_info["triton"] = triton.__version__

    return run
