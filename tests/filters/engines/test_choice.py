"""rdm_fast.filters.engines.choice: which engine `auto` is, and what becomes of one that failed."""

import pytest
import torch
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.errors import Unavailable
from rdm_fast.filters.engines import Engine, engine_for
from rdm_fast.filters.engines import choice as choice_module
from rdm_fast.filters.loss import spectral_loss
from rdm_kernels.matrix_function import CHOLESKY_FAILED, INACCURATE, NOT_FINITE
from tests.spectra import gradients, two_views

CPU = torch.device("cpu")
SQUARE = FilterConfig(sigma=2.0)
RISING = FilterConfig(kind="log_1")
WEAK = FilterConfig(kind="log")
TARGET = FilterConfig(location="target", sigma=-1.0)
CENTERED = FilterConfig(sigma=2.0, center=True)


@pytest.mark.parametrize(
    ("device", "fast_float64", "gemm"),
    [
        ("cpu", True, [SQUARE]),
        ("cuda", True, [SQUARE, RISING, WEAK, FilterConfig(sigma=-0.5), TARGET]),
        ("cuda", False, [SQUARE, RISING, TARGET]),
    ],
)
def test_auto_takes_products_where_they_are_faster_and_accurate(
    device: str, fast_float64: bool, gemm: list[FilterConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice_module, "has_fast_float64", lambda device: fast_float64)
    for config in (SQUARE, RISING, WEAK, FilterConfig(sigma=-0.5), TARGET, CENTERED):
        expected = "gemm" if config in gemm else "eigh"
        assert choice_module.choose(config, torch.device(device)) == expected


@pytest.mark.parametrize("name", ["eigh", "gemm", "reference"])
def test_an_engine_asked_for_by_name_is_taken(name: str) -> None:
    config = FilterConfig(engine=name)  # type: ignore[arg-type]
    assert Engine(config, torch.device("cuda")).current() == name


def status(*words: int) -> Tensor:
    return torch.tensor(words, dtype=torch.int32)


@pytest.mark.parametrize(
    ("word", "reason"), [(CHOLESKY_FAILED, "Cholesky"), (INACCURATE, "residuals are large")]
)
def test_auto_goes_on_with_eigh_after_one_batch_that_was_not_accurate(
    word: int, reason: str
) -> None:
    engine = Engine(SQUARE, CPU)
    engine.watch(status(0, 0))
    assert (engine.current(), engine.failures) == ("gemm", 0)
    engine.watch(status(0, word))
    with pytest.warns(UserWarning, match=f"gemm was not accurate on a batch.*{reason}"):
        assert engine.current() == "eigh"
    assert engine.failures == 1
    assert engine.current() == "eigh"


def test_a_batch_that_is_not_finite_is_no_reason_to_change_the_engine() -> None:
    engine = Engine(SQUARE, CPU)
    engine.watch(status(NOT_FINITE, 0))
    assert (engine.current(), engine.failures) == ("gemm", 0)


def test_gemm_by_name_ends_loudly() -> None:
    engine = Engine(FilterConfig(engine="gemm"), CPU)
    engine.watch(status(CHOLESKY_FAILED | INACCURATE))
    with pytest.raises(Unavailable, match=r"Cholesky factorization failed and residuals.*auto"):
        engine.current()


@pytest.mark.filterwarnings("ignore:filter.engine=gemm was not accurate")
def test_a_checkpoint_keeps_a_failure_that_was_not_yet_looked_at() -> None:
    engine = Engine(SQUARE, CPU)
    engine.watch(status(INACCURATE))
    kept = engine.state
    other = Engine(SQUARE, CPU)
    other.restore(kept)
    assert (other.current(), other.failures) == ("eigh", 1)
    other.restore({})
    assert (other.current(), other.failures) == ("gemm", 0)


@pytest.mark.filterwarnings("ignore:filter.engine=gemm was not accurate")
def test_a_failed_factorization_costs_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """That batch has a filter of zero, so a loss and a gradient of zero; the next one is right."""
    config = FilterConfig(sigma=0.5)
    engine = engine_for(config, CPU)
    engine.restore({"name": "gemm"})
    z1, z2 = two_views(24, 64, "k^-1/2")
    cholesky = torch.linalg.cholesky_ex
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "cholesky_ex", lambda A: (cholesky(A)[0], status(0, 1)))
        loss, grad1, grad2 = gradients(z1, z2, config)
    assert loss.isfinite()
    assert [bool(grad.any()) for grad in (grad1, grad2)] == [True, False]
    expected = gradients(z1, z2, FilterConfig(sigma=0.5, engine="eigh"))
    for found, right in zip(gradients(z1, z2, config), expected, strict=True):
        assert torch.equal(found, right)
    assert (engine.name, engine.failures) == ("eigh", 1)
    engine.restore({})


def test_all_users_of_equal_filters_share_an_engine() -> None:
    assert engine_for(FilterConfig(sigma=2.0), CPU) is engine_for(FilterConfig(sigma=2.0), CPU)
    assert engine_for(FilterConfig(sigma=1.0), CPU) is not engine_for(FilterConfig(), CPU) or (
        FilterConfig(sigma=1.0) == FilterConfig()
    )


def test_a_name_that_was_taken_is_the_engine_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    from rdm_fast.filters import engines

    built: list[str] = []
    for name, engine in list(engines.ENGINES.items()):

        def build(
            *args: object, name: str = name, engine: type = engine, **words: object
        ) -> object:
            built.append(name)
            return engine(*args, **words)

        monkeypatch.setitem(engines.ENGINES, name, build)
    for config in (FilterConfig(), SQUARE, FilterConfig(engine="reference"), TARGET):
        spectral_loss(*two_views(16, 32, "flat"), config)
    assert built == ["eigh", "gemm", "reference", "eigh"]
