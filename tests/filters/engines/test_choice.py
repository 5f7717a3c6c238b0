"""engines.choice: which engine `auto` is, and what happens after a batch on which gemm failed."""

import copy
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.errors import Unavailable
from rdm_fast.filters import loss
from rdm_fast.filters.engines import EngineSelector
from rdm_fast.filters.engines.gemm import GemmFilter
from rdm_fast.filters.loss import SpectralCosine, SpectralPredictor, spectral_loss
from rdm_kernels import filter_factors, filter_steps
from rdm_kernels.filter_steps import INACCURATE, NOT_FINITE
from tests.ranks import run_ranks
from tests.spectra import gradients, two_views
from tests.spies import calls_of

CPU = torch.device("cpu")
SQUARE = FilterConfig(sigma=2.0)
RISING = FilterConfig(kind="log_1")
WEAK = FilterConfig(kind="log")
FALLING = FilterConfig(sigma=-0.5)
STEEP = FilterConfig(sigma=-0.7)
TARGET = FilterConfig(location="target", sigma=-1.0)
CENTERED = FilterConfig(sigma=2.0, center=True)
CROSSED = FilterConfig(location="target", basis="online", sigma=-1.0)
HIGH = FilterConfig(sigma=7.0)
FILTERS = [SQUARE, RISING, WEAK, FALLING, STEEP, TARGET, CROSSED, HIGH, CENTERED]


def status(*words: int) -> Tensor:
    return torch.tensor(words, dtype=torch.int32)


@pytest.mark.parametrize(
    ("device", "gemm"), [("cpu", [SQUARE]), ("cuda", [SQUARE, RISING, WEAK, FALLING, TARGET])]
)
def test_auto_takes_the_fastest_engine_that_is_accurate(
    device: str, gemm: list[FilterConfig]
) -> None:
    for config in FILTERS:
        expected = "gemm" if config in gemm else "eigh"
        assert EngineSelector(config).current(torch.device(device)) == expected


@pytest.mark.parametrize("name", ["eigh", "gemm", "reference"])
def test_a_named_engine_is_used(name: str) -> None:
    config = FilterConfig(engine=name)  # type: ignore[arg-type]
    assert EngineSelector(config).current(torch.device("cuda")) == name


def test_a_status_word_waits_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA forbids the capturing thread to wait for the word of an earlier batch."""
    selector = EngineSelector(RISING)
    selector.watch(status(INACCURATE, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert selector.current(torch.device("cuda")) == "gemm" and selector.failures == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(UserWarning, match="not accurate"):
        assert selector.current(torch.device("cuda")) == "eigh"
    assert selector.failures == 1


@pytest.mark.parametrize(
    ("engine", "cutoff", "applied"),
    [("eigh", 1e-4, 1e-4), ("gemm", 1e-4, 1e-3), ("gemm", 1e-2, 1e-2)],
)
def test_measures_take_the_cutoff_of_the_engine(engine: Any, cutoff: float, applied: float) -> None:
    selector = EngineSelector(FilterConfig(engine=engine, cutoff=cutoff))
    selector.current(CPU)
    assert selector.applied.cutoff == applied
    assert selector.config.cutoff == cutoff


def test_auto_switches_to_eigh_after_one_inaccurate_batch() -> None:
    selector = EngineSelector(SQUARE)
    selector.watch(status(0, NOT_FINITE))  # not the engine's fault
    assert (selector.current(CPU), selector.failures) == ("gemm", 0)
    selector.watch(status(0, INACCURATE))
    with pytest.warns(UserWarning, match="engine=eigh"):
        assert selector.current(CPU) == "eigh"
    assert (selector.current(CPU), selector.failures) == ("eigh", 1)


def test_gemm_by_name_raises_after_an_inaccurate_batch() -> None:
    selector = EngineSelector(FilterConfig(engine="gemm"))
    selector.watch(status(INACCURATE))
    with pytest.raises(Unavailable):
        selector.current(CPU)


def _after_one_failed() -> tuple[str, int, str]:
    """Engine, failures and the warning, where rank 1's word alone has a reason."""
    selector = EngineSelector(RISING)
    selector.load_state_dict({"name": "gemm", "failures": 0})
    selector.watch(status(0, INACCURATE) if dist.get_rank() else status(NOT_FINITE, 0))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        return selector.current(CPU), selector.failures, str(warned[0].message)


def test_a_batch_that_failed_on_one_rank_changes_the_engine_of_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, _after_one_failed, tmp_path=tmp_path)
    assert first == second and first[:2] == ("eigh", 1)


@pytest.mark.filterwarnings("ignore:filter.engine=gemm was not accurate")
def test_the_state_includes_the_last_batch() -> None:
    selector, resumed = EngineSelector(SQUARE), EngineSelector(SQUARE)
    selector.watch(status(INACCURATE))
    assert selector.state_dict() == {"name": "eigh", "failures": 1}
    resumed.watch(status(INACCURATE))  # before it is loaded: forgotten
    resumed.load_state_dict(selector.state_dict())
    assert (resumed.current(CPU), resumed.failures) == ("eigh", 1)


@pytest.mark.filterwarnings("ignore:filter.engine=gemm was not accurate")
def test_a_large_residual_costs_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """That batch has a filter of zero, so a loss and a gradient of zero; the next one is right."""
    criterion = SpectralCosine(FilterConfig(sigma=0.5))
    criterion.selector.load_state_dict({"name": "gemm", "failures": 0})
    z1, z2 = two_views(24, 64, "k^-1/2")
    combine = filter_steps.define_combine
    with monkeypatch.context() as patched:
        far = torch.tensor([0.0, 1.0])
        patched.setattr(
            sys.modules[filter_factors.__module__],
            "combine",
            lambda weights, matrices, root, _, *rest: combine(weights, matrices, root, far, *rest),
        )
        failed, grad1, grad2 = gradients(z1, z2, criterion.filter, criterion=criterion)
    assert failed.isfinite()
    assert [bool(grad.any()) for grad in (grad1, grad2)] == [True, False]
    found = gradients(z1, z2, criterion.filter, criterion=criterion)
    expected = gradients(z1, z2, FilterConfig(sigma=0.5, engine="eigh"))
    assert all(map(torch.equal, found, expected))
    assert criterion.selector.state_dict() == {"name": "eigh", "failures": 1}


@pytest.mark.filterwarnings("ignore:filter.engine=gemm was not accurate")
def test_spectral_loss_shares_a_selector_modules_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FilterConfig(sigma=2.0, cutoff=2e-3)  # no other test has it
    built = calls_of(monkeypatch, loss, "build_filter")
    monkeypatch.setattr(GemmFilter, "status", status(INACCURATE))
    z1, z2 = two_views(16, 32, "flat")
    for _ in range(3):
        spectral_loss(z1, z2, config)
    predictor = SpectralPredictor(config)
    for _ in range(2):
        predictor(z1)
    assert [engine for engine, *_ in built] == ["gemm", "eigh", "eigh", "gemm", "eigh"]


def test_a_copied_or_pickled_predictor_forgets_the_batch_of_the_original() -> None:
    predictor = SpectralPredictor(SQUARE)
    predictor(torch.randn(16, 32))
    predictor.selector.watch(status(INACCURATE))
    for copied in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert copied.selector.state_dict() == {"name": "gemm", "failures": 0}


def test_a_criterion_adds_nothing_to_a_checkpoint() -> None:
    criterion = SpectralCosine(SQUARE)
    assert not criterion.state_dict() and not list(criterion.buffers())
