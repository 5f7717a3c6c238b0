"""The verdict on a measured step: the true bottleneck, and advice that fits."""

from dataclasses import replace
from typing import Any

import pytest

from rdm_fast.config import Config, Precision
from rdm_fast.config.recipes import recipe
from rdm_fast.tools.doctor.verdict import Situation, Verdict, verdict

Times = tuple[float, float, float]


def judge(
    loader: float, model: float, filter: float = 0, /, config: Config | None = None, **here: object
) -> Verdict:
    """On an idle 8-core CPU without DALI, for times in milliseconds."""
    config = config or recipe("imagenet_rdm_simsiam")
    times = {"loader": loader, "model": model, "filter": filter, "end to end": 1.0}
    settings: dict[str, object] = dict(loader="torch", engine="eigh", dali="", cpus=8, threads=8)
    settings |= {"on_gpu": False, "fast_bf16": False, **here}
    seconds = {name: t / 1e3 for name, t in times.items()}
    return verdict(Situation(config=config, seconds=seconds, **settings))  # type: ignore[arg-type]


def imagenet(precision: Precision = "bf16", **data: Any) -> Config:
    config = recipe("imagenet_rdm_simsiam")
    return replace(config, precision=precision, data=replace(config.data, **data))


@pytest.mark.parametrize(
    ("times", "workers", "loader", "expected"),
    [
        ((50, 40, 5), 2, "torch", "loader"),  # slower than the device, which works meanwhile
        ((44, 40, 5), 2, "torch", "model"),  # hidden behind it
        ((44, 40, 5), 0, "torch", "loader"),  # in turns with it
        ((39, 40, 5), 0, "torch", "model"),
        ((10, 40, 50), 2, "torch", "filter"),
        ((60, 30, 40), 2, "torch", "filter"),
        ((44, 40, 5), 2, "resident", "loader"),
        ((44, 40, 5), 2, "dali", "model"),
    ],
)
def test_the_bottleneck(times: Times, workers: int, loader: str, expected: str) -> None:
    assert judge(*times, config=imagenet(workers=workers), loader=loader).bottleneck == expected


SLOW_LOADER, SLOW_MODEL, SLOW_FILTER = (90, 30, 1), (1, 30, 3), (1, 2, 30)
EIGH = recipe("imagenet_rdm_simsiam")  # 512 rows of width 2048
REFERENCE = replace(EIGH, filter=replace(EIGH.filter, engine="reference"))
NARROW = replace(EIGH, model=replace(EIGH.model, projector_dim=64))
COMPILED = replace(EIGH, step=replace(EIGH.step, compile="default"))
FASTEST = replace(EIGH, step=replace(COMPILED.step, deterministic=False))


@pytest.mark.parametrize(
    ("times", "config", "here", "first"),
    [
        (SLOW_LOADER, imagenet(workers=2), {}, "--data.workers 6:"),
        ((900, 30, 0), imagenet(workers=2), {}, "--data.workers 8:"),
        ((31, 30, 0), imagenet(workers=2), {}, "--data.workers 3:"),
        (SLOW_LOADER, EIGH, {"on_gpu": True, "dali": "pip install DALI"},
         "first pip install DALI; then --data.loader dali"),
        (SLOW_LOADER, EIGH, {"on_gpu": True}, "--data.loader dali"),
        (SLOW_LOADER, EIGH, {"loader": "dali"}, "--data.loader torch"),
        (SLOW_LOADER, EIGH, {"loader": "resident", "on_gpu": True}, "--optim.global-batch"),
        (SLOW_FILTER, REFERENCE, {}, "--filter.engine auto"),
        (SLOW_FILTER, EIGH, {}, "--optim.global-batch"),
        (SLOW_FILTER, NARROW, {}, "--model.projector-dim"),
        (SLOW_MODEL, imagenet("fp32"), {"on_gpu": True}, "--precision bf16"),
        (SLOW_MODEL, imagenet("fp32"), {"fast_bf16": True}, "--precision bf16"),
        (SLOW_MODEL, EIGH, {"on_gpu": True}, "--step.compile default"),
        (SLOW_MODEL, COMPILED, {"on_gpu": True}, "--step.no-deterministic"),
        (SLOW_MODEL, FASTEST, {"on_gpu": True}, "more GPUs"),
        (SLOW_MODEL, EIGH, {"threads": 2}, "OMP_NUM_THREADS=8"),
    ],
)  # fmt: skip
def test_first_advice(times: Times, config: Config, here: dict[str, object], first: str) -> None:
    assert judge(*times, config=config, **here).advice[0].startswith(first)


@pytest.mark.parametrize(
    ("times", "config", "here", "absent"),
    [
        (SLOW_LOADER, imagenet(workers=2), {}, "dali"),  # on a CPU
        (SLOW_LOADER, imagenet(workers=8), {}, "workers"),  # all cores are in use
        (SLOW_LOADER, EIGH, {"loader": "dali", "on_gpu": True}, "torch"),
        (SLOW_MODEL, EIGH, {"on_gpu": True}, "--precision"),  # bf16 already
        (SLOW_MODEL, imagenet("fp32"), {}, "--precision"),  # bf16 is slow here
        (SLOW_MODEL, COMPILED, {"on_gpu": True}, "compile"),
        (SLOW_MODEL, EIGH, {}, "OMP"),
        (SLOW_MODEL, EIGH, {}, "deterministic"),
        (SLOW_MODEL, EIGH, {"threads": 2, "on_gpu": True}, "OMP"),
    ],
)
def test_bad_advice(times: Times, config: Config, here: dict[str, object], absent: str) -> None:
    assert absent not in str(judge(*times, config=config, **here).advice)


@pytest.mark.parametrize("loader", ["torch", "dali", "resident"])
@pytest.mark.parametrize("times", [(90, 3, 1), (1, 90, 3), (1, 3, 90)])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_there_is_always_advice(loader: str, times: Times, on_gpu: bool) -> None:
    assert judge(*times, loader=loader, on_gpu=on_gpu).advice
