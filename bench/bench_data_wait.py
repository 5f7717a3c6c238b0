"""What data cost a training step: fed by a loader, against one batch again and again.

Both take turns: a round is some steps of either. A fast loader that works while the device does
costs nothing; one that takes turns with it costs its own time.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from statistics import median
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.bench_loader import jpeg_images, natural_images
from bench.conftest import is_small, synced_clock
from bench.rows import SMALL
from bench.training import CASES, DEVICE, GPU, SMALLEST, train_step
from rdm_fast.config import DataConfig
from rdm_fast.data import Batch, Loader, build_loader
from rdm_fast.errors import Unavailable
from rdm_fast.training.cuda_graph import WARM_UP

ON_GPU = [
    ("cifar10 resnet18 32px b512", "resident", 0),
    ("cifar10 resnet18 32px b512", "dali", 4),
    ("imagenet resnet50 224px b256", "dali", 4),
    ("imagenet resnet50 224px b256", "torch", 12),
]
ON_CPU = [
    ("cifar10 resnet8 32px b64", "resident", 0),
    ("cifar10 resnet8 32px b64", "dali", 1),
    ("cifar10 resnet8 32px b64", "torch", 1),
]
ROUNDS, STEPS = (2, 1) if SMALL else (7, 8)
FILES = 64  # pixels a side of a view from which images are files
BATCHES = 2 * STEPS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = ON_GPU if GPU else ON_CPU
    if is_small(metafunc.config):
        cases = [(SMALLEST.name, loader, workers) for _, loader, workers in cases]
        cases = cases[:1] if SMALL else cases  # each worker is a process
    metafunc.parametrize(("case", "loader", "workers"), cases)


def batches(loader: Loader) -> Iterator[Batch]:
    for epoch in count():
        yield from loader.epoch(epoch)


def bench_data_wait(
    benchmark: BenchmarkFixture,
    record: Callable[[dict[str, Any]], None],
    case: str,
    loader: str,
    workers: int,
) -> None:
    config = CASES[case].config("rdm_simsiam")
    data = DataConfig(name="arrays", loader=loader, workers=workers)  # type: ignore[arg-type]
    config = replace(config, data=data)
    n = BATCHES * config.optim.global_batch
    images = jpeg_images(n) if config.augment.size >= FILES else natural_images(n)
    try:
        made = build_loader(config, images, rank=0, world_size=1, device=DEVICE)
    except Unavailable as error:
        pytest.skip(str(error))
    step, fed_with, known = train_step(config), batches(made), next(batches(made))
    for _ in range(WARM_UP + 1 if step.graph else 1):
        step(next(fed_with), 0)
    if benchmark.disabled:
        benchmark(lambda: step(next(fed_with), 0))
        return

    def fed() -> None:
        for _ in range(STEPS):
            step(next(fed_with), 0)

    alone: list[float] = []

    def unfed() -> None:
        start = synced_clock()
        for _ in range(STEPS):
            step(known, 0)
        alone.append((synced_clock() - start) / STEPS)

    benchmark.pedantic(fed, setup=unfed, rounds=ROUNDS, iterations=1)
    with_data = [seconds / STEPS for seconds in benchmark.stats.stats.data]
    shares = [100 * (1 - a / b) for a, b in zip(alone, with_data, strict=True)]
    record(
        {
            "median_s": median(with_data),
            "iqr_s": benchmark.stats.stats.iqr / STEPS,
            "rounds": ROUNDS,
            "iterations": STEPS,
            "unfed_s": median(alone),
            "data_percent": median(shares),
        }
    )
