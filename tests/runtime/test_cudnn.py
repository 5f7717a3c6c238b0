"""runtime.cudnn: deterministic convolutions, or the fastest, wherever convolutions run."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.training import FASTEST, SMALLEST, our_step, supervised_step, with_cudnn
from rdm_fast.config import Config
from rdm_fast.config.recipes import RECIPES
from rdm_fast.config.saved import check_resumable, config_digest, config_from_dict, config_to_dict
from rdm_fast.evaluation.run import evaluate
from rdm_fast.run.folder import RunFolder
from rdm_fast.runtime.cudnn import choose_algorithms
from rdm_fast.tools.doctor.stages import StepParts
from rdm_fast.training.trainer import Trainer
from tests.tiny import tiny

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False


def flags() -> tuple[bool, bool]:
    return torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark


def test_timing_algorithms_and_determinism_exclude_each_other() -> None:
    for deterministic in (True, False, True):
        choose_algorithms(deterministic=deterministic)
        assert flags() == (deterministic, not deterministic)


class Stopped(Exception):
    pass


def stop(*_: Any) -> Any:
    raise Stopped


def start_training(config: Config, path: Path) -> None:
    with RunFolder.open(str(path), config, overwrite=False, rank=0) as folder:
        Trainer(config, folder, CPU)


def start_evaluation(config: Config, _: Path) -> None:
    command: Any = SimpleNamespace(protocol_for=stop)
    loaded: Any = SimpleNamespace(config=config)
    evaluate(loaded, command, CPU)


def start_doctor(config: Config, _: Path) -> None:
    anything: Any = None
    parts = StepParts(config, anything, anything, CPU, batches=1)
    parts.loading = stop  # type: ignore[method-assign]
    next(parts.stages())


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("start", [start_training, start_evaluation, start_doctor])
def test_the_setting_is_heeded_by(
    start: Callable[[Config, Path], None], deterministic: bool, tmp_path: Path
) -> None:
    config = tiny()
    assert config.step.deterministic  # the default
    config = replace(config, step=replace(config.step, deterministic=deterministic))
    choose_algorithms(deterministic=not deterministic)
    with suppress(Stopped):
        start(config, tmp_path / "run")
    assert flags() == (deterministic, not deterministic)


def test_a_benchmarks_rivals_keep_their_algorithms_when_they_take_turns() -> None:
    config = SMALLEST.config("rdm_simsiam")
    ours, fast = (our_step(with_cudnn(config, name)) for name in ("deterministic", FASTEST))
    roof = supervised_step(SMALLEST)
    for _ in range(2):
        for call, deterministic in ((ours, True), (roof, False), (fast, False)):
            choose_algorithms(deterministic=not deterministic)
            call()
            assert flags() == (deterministic, not deterministic)


def test_nothing_else_chooses() -> None:
    """One function sets both flags, so that they cannot disagree."""
    chosen = re.compile(r"cudnn\.(deterministic|benchmark) *=")
    files = [path for part in ("rdm_fast", "bench") for path in (ROOT / part).rglob("*.py")]
    found = [path.name for path in files if chosen.search(path.read_text(encoding="utf-8"))]
    assert found == ["cudnn.py"]


def test_a_run_of_before_the_setting_resumes_and_either_value_may() -> None:
    config = RECIPES["cifar10_rdm_byol"]()
    fast = replace(config, step=replace(config.step, deterministic=False))
    older = config_to_dict(config)
    del older["step"]["deterministic"]
    assert config_from_dict(older) == config
    for resumed in (config, fast):
        check_resumable(older, resumed)
    assert config_digest(config) == config_digest(fast)
    assert config_from_dict(config_to_dict(fast)) == fast
