"""Timing rules for every benchmark: `pytest bench` on a GPU, `--benchmark-disable` elsewhere."""

import statistics
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.machine import device_name, floor, peak
from bench.rows import SMALL, append

T = TypeVar("T")

ROUND_S = 0.02  # so that the clock and the one wait for the GPU do not matter
RIVALS = ("name", "loader")  # parameters that name an implementation
SHORTEST_S = 0.002
WARM_S, WARM_CALLS = 1.0, 4
MIN_ROUNDS, MAX_ROUNDS = 5, 30
SLOW_S, SLOW_ROUNDS = 3.0, 3  # from so many seconds a call on, so few rounds are enough


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rdm benchmarks")
    group.addoption("--seconds", type=float, default=2.0, help="time for the rounds of a case")
    group.addoption("--first", action="store_true", help="only the most important shape of each")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_disable"):  # nothing is timed, so one core is enough
        torch.set_num_threads(1)


def is_small(config: pytest.Config) -> bool:
    """Whether to run the smallest form of every case, as is enough where nothing is timed."""
    return SMALL or bool(config.getoption("benchmark_disable"))


def seconds_of(config: pytest.Config) -> float:
    """Time for the rounds of a case."""
    return SHORTEST_S if SMALL else float(config.getoption("seconds"))


def chosen(config: pytest.Config, small: Sequence[T], cases: Sequence[T]) -> Sequence[T]:
    """The smallest cases or all others, the most important first; with --first only that one."""
    cases = small if is_small(config) else cases
    return cases[:1] if config.getoption("first") else cases


def synced_clock() -> float:
    """Time in seconds, read when the GPU is idle.

    pytest-benchmark reads its timer at both ends of a round and divides by the calls in between, so
    a round has one wait. No wait would measure launches alone; a wait per call, idle gaps.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=synced_clock, group=group_of(item)))


def group_of(item: pytest.Item) -> str:
    """Name of a table: rivals in one benchmark that agree in all other parameters."""
    callspec = getattr(item, "callspec", None)
    parameters: dict[str, object] = callspec.params if callspec else {}
    others = [f"{key}={value}" for key, value in parameters.items() if key not in RIVALS]
    return " ".join([getattr(item, "originalname", item.name), *others])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def warmed(fn: Callable[[], object]) -> float:
    """Seconds of the fastest of up to four warm-up calls."""
    times: list[float] = []
    while len(times) < WARM_CALLS and sum(times) < WARM_S:
        times += timeit.repeat(fn, timer=synced_clock, number=1, repeat=1)
    return min(times)


def plan(once: float, seconds: float) -> tuple[int, int]:
    """Numbers of rounds and of calls per round that fit into so many seconds."""
    iterations = max(1, round(min(ROUND_S, seconds) / once))
    fewest = MIN_ROUNDS if once < SLOW_S else SLOW_ROUNDS
    return min(MAX_ROUNDS, max(fewest, round(seconds / (once * iterations)))), iterations


def replay(fn: Callable[[], object]) -> Callable[[], None]:
    """fn as a CUDA graph, without launches, as in a captured training step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # make what is made once before the capture
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        fn()
    return graph.replay


@pytest.fixture
def record(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> Callable[[dict[str, Any]], None]:
    """A function that writes values and the case's parameters as a row (bench.rows)."""
    params = request.node.callspec.params
    row: dict[str, Any] = {"bench": request.function.__name__, **params}

    def write(values: dict[str, Any]) -> None:
        row.update(values)
        benchmark.extra_info.update(row)
        append(request.config.getoption("rows", None), row)

    return write


@pytest.fixture
def measure(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    record: Callable[[dict[str, Any]], None],
) -> Callable[..., None]:
    """A function that times another one in rounds, after warm-up, and writes a row of `--rows`.

    Its arguments are the function, `bytes_moved` and `flops` (the least that the case needs, as for
    `bench.machine.floor`), and `capturable`, to time it also as a CUDA graph where there is a GPU.
    A row has medians and inter-quartile ranges in seconds, numbers of rounds and of calls in each,
    and the share of the floor where the device's peaks are known.
    """

    def run(
        fn: Callable[[], object],
        *,
        bytes_moved: float = 0,
        flops: Mapping[str, float] | None = None,
        capturable: bool = False,
    ) -> None:
        if benchmark.disabled:
            benchmark(fn)
            return
        seconds = seconds_of(request.config)
        rounds, iterations = plan(warmed(fn), seconds)
        benchmark.pedantic(fn, rounds=rounds, iterations=iterations)
        row: dict[str, Any] = {
            "median_s": benchmark.stats["median"],
            "iqr_s": benchmark.stats["iqr"],
            "rounds": rounds,
            "iterations": iterations,
            "bytes": bytes_moved,
            "flops": dict(flops or {}),
        }
        if capturable and torch.cuda.is_available():
            row.update(_captured(fn, seconds))
        known = peak(device_name())
        if known and (bytes_moved or flops):
            row["floor_s"] = floor(known, bytes_moved, flops or {})
            fastest = min(row["median_s"], row.get("graph_median_s", row["median_s"]))
            row["percent_of_floor"] = 100 * row["floor_s"] / fastest
        record(row)

    return run


def _captured(fn: Callable[[], object], seconds: float) -> dict[str, Any]:
    """Median and inter-quartile range of fn's CUDA graph, or the error of its capture."""
    try:
        again = replay(fn)
    except RuntimeError as error:
        return {"graph_error": str(error)[:300]}
    rounds, iterations = plan(warmed(again), seconds)
    times = timeit.repeat(again, timer=synced_clock, number=iterations, repeat=rounds)
    low, median, high = statistics.quantiles([t / iterations for t in times], n=4)
    return {"graph_median_s": median, "graph_iqr_s": high - low}
