"""The same step in other forms: channels-last, compiled, without a wait; on a GPU, as a graph."""

import shutil
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_fast.config import Config, StepConfig
from rdm_fast.data import Batch
from rdm_fast.errors import Unavailable
from rdm_fast.methods import Method, build_method
from rdm_fast.runtime.cudnn import choose_algorithms
from rdm_fast.runtime.host_copy import HostCopy
from rdm_fast.training.cuda_graph import WARM_UP
from rdm_fast.training.train_step import StepReport, TrainStep
from tests.runs import new_step
from tests.spies import Operators, nothing_waits, refused, waits
from tests.tiny import METHODS, batch, tiny, with_small_views

ROWS = 32
NAMES = pytest.mark.parametrize("name", METHODS)


def with_step(config: Config, **settings: Any) -> Config:
    return replace(config, step=StepConfig(**settings))


# ---- memory format -------------------------------------------------------------------------------


@NAMES
def test_channels_last_gives_the_loss_and_gradient_of_plain_nchw(name: str) -> None:
    """Convolutions sum 9 * 16 products in another order, layer after layer, in float32. A gradient
    of nothing but rounding, as of a bias before a batch norm, is measured by that of the others."""
    config = tiny(name, global_batch=ROWS)
    torch.manual_seed(0)
    plain = build_method(config)
    step = new_step(config)
    assert step.method.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    expected = plain(batch(ROWS).view1, batch(ROWS).view2)
    expected.loss.backward()
    views = (v.contiguous(memory_format=torch.channels_last) for v in batch(ROWS).views)
    loss, _ = step._backward(tuple(views))
    torch.testing.assert_close(loss, expected.loss.detach(), atol=1e-5, rtol=0)
    references = dict(plain.named_parameters())
    gradients = [p.grad for p in references.values() if p.grad is not None]
    whole = torch.nn.utils.get_total_norm(gradients)
    for path, found in step.method.named_parameters():
        reference = references[path].grad
        if reference is not None:
            error = (found.grad - reference).norm() / (reference.norm() + 1e-3 * whole)
            assert error < 1e-3, f"{path}: {error:.1e}"


# ---- waiting -------------------------------------------------------------------------------------


@NAMES
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_step_reads_a_value_back(name: str, precision: str, accumulate: int) -> None:
    config = tiny(name, global_batch=ROWS, accumulate=accumulate)
    step = new_step(replace(config, precision=precision))  # type: ignore[arg-type]
    read: list[Any] = []
    with Operators(lambda operator, _: waits(operator) and read.append(operator)):
        reports = [step(batch(ROWS, seed=i), i) for i in range(5, 8)]
        assert not read
        reports[-1].loss.item()
        assert len(read) == 1  # the count itself works
    if precision != "fp16":
        assert all(report.applied for report in reports)


def test_a_host_copy_keeps_the_value_at_its_time() -> None:
    value = torch.tensor([1.0, 2.0])
    copy = HostCopy(value)
    value.fill_(7)
    assert copy.read().tolist() == [1.0, 2.0]


# ---- recording -----------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["auto", "off"])
def test_on_a_cpu_no_step_is_recorded(graph: str) -> None:
    step = new_step(with_step(tiny(global_batch=ROWS), graph=graph))
    assert step.graph is None
    assert step(batch(ROWS), 5).applied


def test_a_required_graph_is_refused_on_a_cpu() -> None:
    with refused(Unavailable, "--step.graph on"):
        new_step(with_step(tiny(global_batch=ROWS), graph="on"))


# ---- compiled ------------------------------------------------------------------------------------


INDUCTOR = pytest.param(
    "inductor",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU"),
    ],
)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_a_compiled_step_is_the_eager_one(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused loops sum in another order, in float32. Evaluation on other shapes compiles nothing.
    aot_eager traces as inductor does, and generates no code."""

    def compile(module: torch.nn.Module, mode: str, dynamic: bool) -> None:
        assert mode == "default"
        options = {"mode": mode} if backend == "inductor" else {}
        plain(module, backend=backend, dynamic=dynamic, **options)

    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    config = tiny(global_batch=ROWS)
    eager, compiled = new_step(config), new_step(with_step(config, compile="default"))
    names = list(compiled.method.state_dict())
    assert names == list(eager.method.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for i in range(5, 9):
        ours, theirs = compiled(batch(ROWS, seed=i), i), eager(batch(ROWS, seed=i), i)
        torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.grad_norm, theirs.grad_norm, atol=0, rtol=1e-3)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        with compiled.uncompiled(), torch.no_grad():
            compiled.method.backbone.eval()
            compiled.method.backbone(batch(7).view1)
            compiled.method.backbone.train()
    assert graphs[0] >= 2, "backbone and heads were compiled"
    assert graphs == graphs[:1] * 4, "and never again"
    for name, tensor in compiled.method.state_dict().items():
        torch.testing.assert_close(
            tensor, eager.method.state_dict()[name], atol=1e-4, rtol=0, msg=lambda m, n=name: n + m
        )
    torch._dynamo.reset()


# ---- on a GPU ------------------------------------------------------------------------------------

GPU = torch.device("cuda")
AS_GRAPH = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])


def on_gpu(of: Batch) -> Batch:
    views = [view.to(GPU).contiguous(memory_format=torch.channels_last) for view in of.views]
    return Batch(*views[:2], of.labels.to(GPU), of.indices, tuple(views[2:]))


def run(step: TrainStep, numbers: range) -> list[StepReport]:
    """Steps 0 to 3 have learning rates that move the weights visibly."""
    return [step(on_gpu(batch(ROWS, seed=i)), i) for i in numbers]


def weights(method: Method) -> dict[str, Tensor]:
    return deepcopy(method.state_dict())


@pytest.mark.gpu
@NAMES
@AS_GRAPH
@pytest.mark.parametrize("small", [0, 2])
def test_a_recorded_step_is_the_eager_step_bitwise(name: str, precision: str, small: int) -> None:
    if small and "symsimsiam" in name:
        pytest.skip("symsimsiam has no small views")
    config = with_small_views(name, small, global_batch=ROWS)
    config = replace(config, precision=precision)  # type: ignore[arg-type]
    choose_algorithms(deterministic=True)
    eager, recorded = (new_step(with_step(config, graph=form), GPU) for form in ("off", "on"))
    for i in range(5, 12):
        shown = on_gpu(batch(ROWS, seed=i, size=16, small=small))
        found, expected = recorded(shown, i), eager(shown, i)
        assert torch.equal(found.loss, expected.loss), f"step {i}"
        assert torch.equal(found.branches.online, expected.branches.online)
    assert recorded.graph is not None and recorded.graph.is_recorded and eager.graph is None
    for key, tensor in weights(recorded.method).items():
        assert torch.equal(tensor, weights(eager.method)[key]), key


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("clip", ["clip_norm", "clip_each"])
def test_a_recorded_step_clips_and_sees_every_new_weight_decay(optimizer: str, clip: str) -> None:
    """Bit for bit as the eager one, and without a wait."""
    changing: dict[str, Any] = {"weight_decay": 0.1, "weight_decay_end": 5.0, clip: 0.01}
    config = tiny(global_batch=ROWS, optimizer=optimizer, base_lr=0.01, **changing)
    choose_algorithms(deterministic=True)
    eager, recorded = (new_step(with_step(config, graph=form), GPU) for form in ("off", "on"))
    run(eager, range(5 + WARM_UP + 4))
    run(recorded, range(5 + WARM_UP))
    batches = [on_gpu(batch(ROWS, seed=i)) for i in range(5 + WARM_UP, 5 + WARM_UP + 4)]
    with nothing_waits():
        for i, views in enumerate(batches):
            recorded(views, 5 + WARM_UP + i)
    assert recorded.graph is not None and recorded.graph.is_recorded and eager.graph is None
    for key, tensor in weights(recorded.method).items():
        assert torch.equal(tensor, weights(eager.method)[key]), key


@pytest.mark.gpu
@NAMES
@AS_GRAPH
@pytest.mark.parametrize("graph", ["on", "off"])
def test_no_step_waits_for_the_gpu(name: str, precision: str, graph: str) -> None:
    config = replace(tiny(name, global_batch=ROWS), precision=precision)  # type: ignore[arg-type]
    step = new_step(with_step(config, graph=graph), GPU)
    run(step, range(5, 5 + WARM_UP + 2))
    batches = [on_gpu(batch(ROWS, seed=i)) for i in range(3)]
    with nothing_waits():
        for i, views in enumerate(batches):
            step(views, 12 + i)


@pytest.mark.gpu
@NAMES
def test_a_recorded_step_on_a_batch_that_is_not_finite_changes_nothing(name: str) -> None:
    step = new_step(with_step(tiny(name, global_batch=ROWS), graph="on"), GPU)
    run(step, range(5, 5 + WARM_UP + 2))
    before = weights(step.method)
    bad = on_gpu(batch(ROWS))
    bad.view1[3] = float("nan")
    assert not step(bad, 11).applied
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(step.method).items())
    assert step(on_gpu(batch(ROWS)), 12).applied


@pytest.mark.gpu
def test_after_a_failure_of_its_engine_a_graph_is_dropped_for_the_eigensolver() -> None:
    step = new_step(tiny(global_batch=ROWS), GPU)
    run(step, range(5, 5 + WARM_UP + 2))
    assert step.graph is not None and step.graph.is_recorded and step.selector is not None
    step.selector.load_state_dict({"name": "eigh", "failures": 1})
    run(step, range(11, 13))
    assert step.graph is None
