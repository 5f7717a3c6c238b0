"""The verdict on a measured step: the true bottleneck, and advice that fits."""

from dataclasses import replace

import pytest

from rdm_fast.config import Config
from rdm_fast.config.recipes import recipe
from rdm_fast.tools.doctor.verdict import Situation, Verdict, verdict


def judge(
    loader: float,
    model: float,
    filter: float = 0.0,
    /,
    config: Config | None = None,
    **changed: object,
) -> Verdict:
    """On an idle 8-core CPU without DALI, for times in milliseconds."""
    config = config or recipe("imagenet_rdm_simsiam")
    times = {"loader": loader, "model": model, "filter": filter, "end to end": 1.0}
    settings: dict[str, object] = {
        "loader": "torch",
        "engine": "eigh",
        "on_gpu": False,
        "cpus": 8,
        "threads": 8,
        "fast_bf16": False,
        "dali": "",
    }
    settings |= changed
    seconds = {name: t / 1e3 for name, t in times.items()}
    return verdict(Situation(config=config, seconds=seconds, **settings))  # type: ignore[arg-type]


def with_workers(workers: int) -> Config:
    config = recipe("imagenet_rdm_simsiam")
    return replace(config, data=replace(config.data, workers=workers))


@pytest.mark.parametrize(
    ("times", "workers", "expected"),
    [
        ((50, 40, 5), 2, "loader"),  # slower than the device, which works at the same time
        ((44, 40, 5), 2, "model"),  # hidden behind it
        ((44, 40, 5), 0, "loader"),  # in turns with it
        ((39, 40, 5), 0, "model"),
        ((10, 40, 50), 2, "filter"),
        ((60, 30, 40), 2, "filter"),
    ],
)
def test_the_bottleneck_is_what_a_step_waits_for(
    times: tuple[float, float, float], workers: int, expected: str
) -> None:
    assert judge(*times, config=with_workers(workers)).bottleneck == expected


def test_a_resident_loader_takes_turns_and_dali_does_not() -> None:
    assert judge(44, 40, 5, loader="resident").bottleneck == "loader"
    assert judge(44, 40, 5, loader="dali").bottleneck == "model"


def test_a_slow_torch_loader_gets_as_many_workers_as_it_needs_and_there_are_cores() -> None:
    advice = judge(90, 30, config=with_workers(2)).advice
    assert advice[0].startswith("--data.workers 6:") and "dali" not in str(advice)  # on a CPU
    assert judge(900, 30, config=with_workers(2)).advice[0].startswith("--data.workers 8:")
    assert judge(31, 30, config=with_workers(2)).advice[0].startswith("--data.workers 3:")
    assert not any("workers" in line for line in judge(90, 30, config=with_workers(8)).advice)


def test_dali_is_first_on_a_gpu_with_the_line_that_installs_it() -> None:
    advice = judge(90, 30, on_gpu=True, dali="pip install DALI").advice
    assert advice[0].startswith("first pip install DALI; then --data.loader dali")
    assert judge(90, 30, on_gpu=True).advice[0].startswith("--data.loader dali")


def test_on_a_cpu_torch_is_first_where_dali_is_slow() -> None:
    assert judge(90, 30, loader="dali").advice[0].startswith("--data.loader torch")
    assert "torch" not in str(judge(90, 30, loader="dali", on_gpu=True).advice)


def test_a_slow_filter_by_name_is_told_of_auto() -> None:
    config = recipe("imagenet_rdm_simsiam")
    slow = replace(config, filter=replace(config.filter, engine="reference"))
    assert judge(1, 2, 30, config=slow).advice[0].startswith("--filter.engine auto")
    assert "--optim.global-batch" in judge(1, 2, 30).advice[0]  # 512 rows of width 2048
    narrow = replace(config, model=replace(config.model, projector_dim=64))
    assert "--model.projector-dim" in judge(1, 2, 30, config=narrow).advice[0]


def test_a_slow_model_is_told_of_bf16_only_where_that_is_fast_and_not_yet_used() -> None:
    config = recipe("imagenet_rdm_simsiam")  # bf16
    wide = replace(config, precision="fp32")
    assert "--precision" not in judge(1, 30, config=config, on_gpu=True).advice[0]
    assert judge(1, 30, config=wide, on_gpu=True).advice[0].startswith("--precision bf16")
    assert judge(1, 30, config=wide, fast_bf16=True).advice[0].startswith("--precision bf16")
    assert "--precision" not in judge(1, 30, config=wide).advice[0]


def test_a_slow_model_on_a_gpu_is_told_of_compiling_until_it_is_compiled() -> None:
    config = recipe("imagenet_rdm_simsiam")
    assert judge(1, 30, on_gpu=True).advice[0].startswith("--step.compile default")
    compiled = replace(config, step=replace(config.step, compile="default"))
    assert not any("compile" in line for line in judge(1, 30, config=compiled, on_gpu=True).advice)


def test_idle_cores_are_told_where_the_model_is_slow_on_a_cpu() -> None:
    assert judge(1, 30, threads=2).advice[0].startswith("OMP_NUM_THREADS=8: torch uses 2 of 8")
    assert not any("OMP" in line for line in judge(1, 30).advice)
    assert not any("OMP" in line for line in judge(1, 30, threads=2, on_gpu=True).advice)


@pytest.mark.parametrize("loader", ["torch", "dali", "resident"])
@pytest.mark.parametrize("times", [(90, 3, 1), (1, 90, 3), (1, 3, 90)])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_there_is_always_something_to_try(
    loader: str, times: tuple[float, float, float], on_gpu: bool
) -> None:
    assert judge(*times, loader=loader, on_gpu=on_gpu).advice
