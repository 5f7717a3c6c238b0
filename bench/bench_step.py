"""How close is a training step to what the machine can do, with and without its filter?

The supervised roof takes turns with every step. It has the same backbone, channels-last, under the
same autocast, with a linear classifier and cross-entropy, on made images. On a GPU it has cuDNN's
fastest algorithms, and each method's step is timed with the deterministic ones, which a run has
by default, and with the fastest. A step of a method sees
two views of each image and the roof one, so a step at the roof's speed takes twice its time. On a
GPU the roof of small images is the faster of the eager step and its CUDA graph.

    simsiam, byol, rdm_...          as in the recipes
    rdm_..._unfiltered              the same step with projections as predictions
    symsimsiam                      without predictor and stop-gradient
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import chosen, plan, replay, seconds_of, warmed
from bench.training import (
    CASES,
    CUDNN,
    DEVICE,
    GPU,
    LAUNCHES_MATTER,
    ON_CPU,
    ON_GPU,
    PRECISION,
    SMALLEST,
    UNFILTERED,
    Call,
    Case,
    Turn,
    noise,
    our_step,
    peak_memory_gib,
    phases,
    ratio,
    spread,
    supervised_step,
    train_step,
    turn,
    with_cudnn,
)
from rdm_fast.config import Config
from rdm_fast.runtime.precision import dtype_of_views

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
    cases = chosen(metafunc.config, [SMALLEST], ON_GPU if GPU else ON_CPU)
    metafunc.parametrize(
        ("name", "case", "cudnn"),
        [(name, case.name, cudnn) for case in cases for name in METHODS for cudnn in CUDNN],
    )


def roof_of(case: Case) -> Call:
    """The supervised step, as a CUDA graph where launches matter and that is faster."""
    eager = supervised_step(case)
    if not GPU or case.side > LAUNCHES_MATTER:
        return eager
    try:
        captured = replay(eager)
    except RuntimeError:
        return eager
    return captured if warmed(captured) < warmed(eager) else eager


def bench_train_step(
    benchmark: BenchmarkFixture,
    record: Callable[[dict[str, Any]], None],
    request: pytest.FixtureRequest,
    name: str,
    case: str,
    cudnn: str,
) -> None:
    if GPU:
        torch.cuda.empty_cache()  # the previous case may hold nearly all memory
    shape = CASES[case]
    try:
        config = with_cudnn(shape.config(name), cudnn)
        step = our_step(config, filtered=not name.endswith(UNFILTERED))
        once = warmed(step)
        roof = roof_of(shape)
        warmed(roof)
    except torch.OutOfMemoryError:
        pytest.skip("does not fit into this GPU's memory")
    if benchmark.disabled:
        benchmark(step)
        phases_of(name, config, rounds=1)
        return
    rounds, _ = plan(once, seconds_of(request.config))
    memory = peak_memory_gib(step)
    of_roof, of_step = list[Turn](), list[Turn]()
    benchmark.pedantic(
        lambda: of_step.append(turn(step, 1)),
        setup=lambda: of_roof.append(turn(roof, 1)),
        rounds=rounds,
        iterations=1,
    )
    median, iqr = spread([one.wall for one in of_step])
    row = {
        "median_s": median,
        "iqr_s": iqr,
        "rounds": rounds,
        "images_per_s": shape.batch / median,
        "percent_of_roof": percent([t.wall for t in of_roof], [t.wall for t in of_step]),
        "phases_ms": phases_of(name, config, PHASE_ROUNDS),
        "peak_memory_gib": memory,
        "precision": PRECISION,
        "cudnn": cudnn,
    }
    if not GPU:
        cpu = percent([t.cpu for t in of_roof], [t.cpu for t in of_step])
        row |= {"cpu_percent_of_roof": cpu, "load_average": os.getloadavg()[0]}
    record(row)


def percent(roof: list[float], step: list[float]) -> float:
    """A step's speed per view in percent of the roof's, the median over rounds."""
    return 100 * ratio([2 * theirs for theirs in roof], step)


def phases_of(name: str, config: Config, rounds: int) -> dict[str, float]:
    step = train_step(config, filtered=not name.endswith(UNFILTERED))
    return phases(step, noise(config, dtype_of_views(PRECISION, DEVICE)), rounds)
