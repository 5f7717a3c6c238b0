"""How close is a training step to what the machine can do? Each method, filter on and off.

The supervised roof takes turns with every step: the same backbone, channels-last and under the same
autocast, with a linear classifier and cross-entropy, on made images. A step of ours sees two views
of an image, the roof one, so at the roof's speed per view a step takes twice the roof's time. On a
GPU the roof is the faster of the eager step and of its CUDA graph.

    simsiam, byol, rdm_...          as the recipes have them
    rdm_..._unfiltered              the same step without its filter, projections as predictions
    symsimsiam                      without predictor and stop-gradient
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import is_small, plan, replay, synced_clock, warmed
from bench.training import (
    CASES,
    GPU,
    ON_CPU,
    ON_GPU,
    PRECISION,
    SMALLEST,
    UNFILTERED,
    Call,
    Case,
    input_dtype,
    noise,
    our_step,
    peak_memory_gib,
    phases,
    spread,
    supervised_step,
    train_step,
)

METHODS = [
    "simsiam",
    "rdm_simsiam",
    f"rdm_simsiam{UNFILTERED}",
    "byol",
    "rdm_byol",
    f"rdm_byol{UNFILTERED}",
    "symsimsiam",
]
PHASE_ROUNDS = 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    small = is_small(metafunc.config)
    cases = [SMALLEST] if small else ON_GPU if GPU else ON_CPU
    metafunc.parametrize(
        ("name", "case"), [(name, case.name) for case in cases for name in METHODS]
    )


def roof_of(case: Case) -> Call:
    """The supervised step, as a CUDA graph if that is faster."""
    eager = supervised_step(case)
    if not GPU:
        return eager
    try:
        captured = replay(eager)
    except RuntimeError:
        return eager
    return captured if warmed(captured) < warmed(eager) else eager


def bench_train_step(
    benchmark: BenchmarkFixture,
    record: Callable[[dict[str, object]], None],
    request: pytest.FixtureRequest,
    name: str,
    case: str,
) -> None:
    torch.backends.cudnn.deterministic = True  # as in training
    shape = CASES[case]
    step = our_step(shape.config(name), filtered=not name.endswith(UNFILTERED))
    if benchmark.disabled:
        benchmark(step)
        phases_of(name, shape, rounds=1)
        supervised_step(shape)()
        return
    roof, roof_times = roof_of(shape), list[float]()
    warmed(roof)
    rounds, _ = plan(warmed(step), request.config.getoption("seconds"))
    memory = peak_memory_gib(step)

    def roof_first() -> None:
        start = synced_clock()
        roof()
        roof_times.append(synced_clock() - start)

    benchmark.pedantic(step, setup=roof_first, rounds=rounds, iterations=1)
    times = benchmark.stats.stats.data
    share = [2 * theirs / ours for ours, theirs in zip(times, roof_times, strict=True)]
    median, iqr = spread(times)
    record(
        {
            "median_s": median,
            "iqr_s": iqr,
            "rounds": rounds,
            "images_per_s": shape.batch / median,
            "roof_s": spread(roof_times)[0],
            "percent_of_roof": 100 * spread(share)[0],
            "phases_ms": phases_of(name, shape, PHASE_ROUNDS),
            "peak_memory_gib": memory,
            "precision": PRECISION,
        }
    )


def phases_of(name: str, case: Case, rounds: int) -> dict[str, float]:
    config = case.config(name)
    step = train_step(config, filtered=not name.endswith(UNFILTERED))
    return phases(step, noise(config, input_dtype(PRECISION)), rounds)
