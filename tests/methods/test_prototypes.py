"""DINO and SwAV against their losses written out, other people's code, and their own state."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_fast.config import Config, FilterConfig, OptimConfig, PrototypesConfig
from rdm_fast.config.recipes import recipe
from rdm_fast.errors import UsageError
from rdm_fast.methods import Dino, PrototypeMethod, Swav, build_method
from rdm_fast.methods.prototypes import Prototypes, unit_rows
from rdm_fast.runtime.distributed import gather_rows
from rdm_fast.spectrum import effective_rank, eigenvalues, filtered_rows
from rdm_fast.tools.sweep.grid import configure
from rdm_fast.training.train_step import TrainStep
from tests.ranks import run_ranks
from tests.runs import final_state, new_step, run, run_with_stops
from tests.spies import refused
from tests.tiny import batch, own_rows, tiny, with_small_views

B, WIDTH, D, K = 12, 10, 6, 16
ROWS = 32
DINO = PrototypesConfig(count=K)
SWAV = replace(DINO, centring="sinkhorn")
KINDS = [(Dino, DINO), (Dino, replace(DINO, centring="none")), (Dino, SWAV), (Swav, SWAV)]
EVERY = pytest.mark.parametrize(("kind", "settings"), KINDS)


def views(n: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, *noise = torch.randn(n + 1, B, WIDTH, generator=generator, dtype=torch.float64)
    return [x + 0.5 * each for each in noise]


def make(kind: type[PrototypeMethod], settings: PrototypesConfig) -> Any:
    """A method of linear layers in float64; target weights and center are not the initial ones."""
    torch.manual_seed(0)
    method: Any = kind(nn.Linear(WIDTH, 8), nn.Linear(8, D), Prototypes(K, D), settings).double()
    with torch.no_grad():
        for name, p in method.named_parameters():
            if name.startswith("target_"):
                p.add_(0.1 * torch.randn_like(p))
        if method.center is not None:
            method.center.normal_(std=0.2)
        if method.queue is not None:
            method.queue.rows.copy_(F.normalize(torch.randn_like(method.queue.rows), dim=-1))
    return method


# ---- the definition, written out ---------------------------------------------------------------


def logits_of(x: Tensor, backbone: nn.Module, head: nn.Module, weight: Tensor) -> Tensor:
    z = head(backbone(x))
    return (z / z.norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=1, keepdim=True)).mT


def log_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """In the log domain; rows sum to 1."""
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()


def assigned(method: Any, view: int, shown: list[Tensor]) -> Tensor:
    """q of one of the two large views."""
    how, is_dino = method.settings, isinstance(method, Dino)
    backbone, head, weight = method.backbone, method.projector, method.prototypes.weight
    if is_dino:
        backbone, head = method.target_backbone, method.target_projector
        weight = method.target_prototypes.weight
    scores = logits_of(shown[view], backbone, head, weight).detach()
    temperature = how.teacher_temp if is_dino else how.epsilon
    if how.centring == "sinkhorn":
        if method.queue is not None and bool(method.queue.wanted):
            C = weight / weight.norm(dim=1, keepdim=True)
            scores = torch.cat([scores, method.queue.rows[1 - view] @ C.mT]).detach()
        return log_sinkhorn(scores, temperature, how.iterations)[:B]
    center = 0 if method.center is None else method.center
    return ((scores - center) / temperature).softmax(dim=1)


def written_out(method: Any, shown: list[Tensor]) -> Tensor:
    """The mean over pairs of the mean cross-entropy over rows."""
    losses = []
    for s, view in enumerate(shown):
        logits = logits_of(view, method.backbone, method.projector, method.prototypes.weight)
        log_p = (logits / method.settings.temperature).log_softmax(dim=1)
        for t in range(2):
            if s != t:
                losses.append(-(assigned(method, t, shown) * log_p).sum(dim=1).mean())
    assert len(losses) == 2 + 2 * (len(shown) - 2)
    return torch.stack(losses).mean()


def gradients(loss: Tensor, method: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in method.parameters() if p.requires_grad]))


def assert_same(method: Any, shown: list[Tensor]) -> None:
    loss, expected = method(*shown).loss, written_out(method, shown)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)  # temperatures are float32
    for ours, theirs in zip(gradients(loss, method), gradients(expected, method), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@EVERY
@pytest.mark.parametrize("n_small", [0, 2])
def test_loss_and_gradient_are_those_of_the_definition(
    kind: type[PrototypeMethod], settings: PrototypesConfig, n_small: int
) -> None:
    assert_same(make(kind, settings), views(2 + n_small))


def test_a_full_queue_is_assigned_with_the_batch_and_one_that_is_not_full_is_not() -> None:
    shown = views()
    method = make(Swav, replace(SWAV, queue=3 * B, queue_epoch=1))
    plain = make(Swav, SWAV)
    method.schedule(0, 4)
    method.queue.seen.fill_(3 * B)
    torch.testing.assert_close(method(*shown).loss, plain(*shown).loss)
    method.schedule(4, 4)
    assert_same(method, shown)
    assert abs(method(*shown).loss - plain(*shown).loss) > 1e-3
    method.queue.seen.fill_(2 * B)  # as at the start, where the rest is zeros
    torch.testing.assert_close(method(*shown).loss, plain(*shown).loss)


@EVERY
def test_no_gradient_reaches_the_targets(
    kind: type[PrototypeMethod], settings: PrototypesConfig
) -> None:
    method = make(kind, settings)
    online, target = method.branches(*views()).online, method.branches(*views()).target
    target.requires_grad_()
    loss = method.loss(online.detach().requires_grad_(), target)
    assert torch.autograd.grad(loss, target, allow_unused=True)[0] is None


def test_the_target_network_sees_the_large_views_only() -> None:
    step = new_step(with_small_views("digits_dino", 3, global_batch=ROWS))
    sizes: list[int] = []
    step.method.target_backbone.register_forward_hook(lambda _, x, y: sizes.append(x[0].shape[-1]))
    step(batch(ROWS, size=16, small=3), 0)
    assert sizes == [16, 16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bit_factors_move_an_assignment_by_a_percent_at_most(
    dtype: torch.dtype,
) -> None:
    """Rounded to bfloat16 themselves, they would move it by 10 %."""
    torch.manual_seed(0)
    exact = Prototypes(4096, 256).double()
    z = unit_rows(torch.randn(64, 256, dtype=torch.float64))
    z[:32] = unit_rows(exact.weight[:32] + 0.1 * torch.randn(32, 256).double() / 16)  # cosines of 1
    narrow = deepcopy(exact).float()
    narrow.dtype = dtype
    found, expected = (p(x) for p, x in ((narrow, z.float()), (exact, z)))
    assert found.dtype == torch.float32
    ratio = ((found.double() - expected) / 0.04).exp()
    rounded = (expected.to(dtype).double() - expected) / 0.04
    assert (ratio - 1).abs().max() < 0.02 and (ratio - 1).square().mean().sqrt() < 0.01
    assert rounded.abs().max() > 2 * (ratio - 1).abs().max()


# ---- other people's losses ---------------------------------------------------------------------


def lightly_inputs(method: Any, shown: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    branches = method.branches(*shown)
    scores = method.assigning(branches.target).detach()
    return list(scores.flip(0)), list(branches.online)


@pytest.mark.parametrize("n_small", [0, 2])
def test_dino_is_lightly_s_loss_with_its_center(n_small: int) -> None:
    lightly = pytest.importorskip("lightly.loss")
    method, shown = make(Dino, DINO).float(), [x.float() for x in views(2 + n_small)]
    theirs = lightly.DINOLoss(K, teacher_temp=0.04, student_temp=0.1, center_momentum=0.9)
    theirs.center.copy_(method.center)
    output = method(*shown)
    expected = theirs(*lightly_inputs(method, shown))
    torch.testing.assert_close(output.loss, expected, atol=1e-6, rtol=0)
    for one, other in zip(gradients(output.loss, method), gradients(expected, method), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    method.update_target(0.5, output.branches)
    torch.testing.assert_close(method.center, theirs.center[0, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_small", [0, 2])
@pytest.mark.parametrize("queue", [0, 2 * B])
def test_swav_is_lightly_s_loss_with_its_queue(n_small: int, queue: int) -> None:
    lightly = pytest.importorskip("lightly.loss")
    method = make(Swav, replace(SWAV, queue=queue)).float()
    shown = [x.float() for x in views(2 + n_small)]
    earlier = None
    if queue:
        method.queue.seen.fill_(queue)
        earlier = list(method.prototypes(method.queue.rows).flip(0))  # row v of ours: the other's
    loss = method(*shown).loss
    _, logits = lightly_inputs(method, shown)
    expected = lightly.SwaVLoss(0.1, 3, 0.05)(logits[:2], logits[2:], earlier)[0]
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    for one, other in zip(gradients(loss, method), gradients(expected, method), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


# ---- with a spectral filter --------------------------------------------------------------------

FILTERS = {
    "target": FilterConfig(location="target", sigma=-1.0),
    "online": FilterConfig(location="online", sigma=1.0),
}
UNHELPED = replace(SWAV, centring="none", epsilon=0.1)


def filtered_by(location: str, kind: Any = Swav, settings: PrototypesConfig = UNHELPED) -> Any:
    torch.manual_seed(0)
    parts = (nn.Linear(WIDTH, 8), nn.Linear(8, D), Prototypes(K, D))
    return kind(*parts, settings, FILTERS[location]).double()


@pytest.mark.parametrize("location", FILTERS)
def test_one_branch_is_filtered_before_its_prototypes(location: str) -> None:
    method, shown = filtered_by(location), views(3)
    z = unit_rows(torch.stack([method.projector(method.backbone(view)) for view in shown]))
    fixed = z.detach()
    filtered = torch.stack([filtered_rows(rows, FILTERS[location]) for rows in fixed])
    W = torch.linalg.pinv(fixed) @ filtered  # what a filter does, without its gradient
    C = F.normalize(method.prototypes.weight, dim=1)
    p_rows = unit_rows(z @ W) if location == "online" else z
    q_rows = unit_rows(filtered) if location == "target" else fixed
    log_p = (p_rows @ C.mT / 0.1).log_softmax(dim=-1)
    q = (q_rows @ C.detach().mT / 0.1).softmax(dim=-1)
    pairs = [(0, 1), (1, 0), (2, 0), (2, 1)]
    expected = torch.stack([-(q[t] * log_p[s]).sum(dim=1).mean() for s, t in pairs]).mean()
    loss = method(*shown).loss
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    for ours, theirs in zip(gradients(loss, method), gradients(expected, method), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("location", FILTERS)
def test_telemetry_of_a_filtered_branch_has_its_rank_and_no_attribution(location: str) -> None:
    method, shown = filtered_by(location), views()
    branches = method(*shown).branches
    metrics = method.spectra(branches, profile=True).metrics()
    p = (branches.online.detach() / 0.1).softmax(dim=-1)
    ranks = [effective_rank(torch.stack([eigenvalues(x) for x in y]).mean(dim=0))
             for y in (p, branches.codes)]  # fmt: skip
    found = [metrics["effective_rank/online"], metrics["effective_rank/target"]]
    assert found == pytest.approx([float(each) for each in ranks])
    assert not [key for key in metrics if key.startswith("rank_difference/")]


def _filtered_losses() -> list[Tensor]:
    losses = []
    for location in FILTERS:
        config = configure(tiny("digits_dino", global_batch=ROWS), f"{location}_s{SIGMA[location]}")
        step = new_step(config)
        step.method.eval()
        losses.append(torch.stack([step(own_rows(batch(ROWS, i)), i).loss for i in range(4, 7)]))
    return losses


SIGMA = {"target": -1, "online": 1}


def test_a_filter_is_that_of_the_global_batch(tmp_path: Path) -> None:
    alone = _filtered_losses()
    ranks = run_ranks(2, _filtered_losses, tmp_path=tmp_path)
    for location in range(len(FILTERS)):
        mean = torch.stack([losses[location] for losses in ranks]).mean(dim=0)
        torch.testing.assert_close(mean, alone[location], atol=2e-5, rtol=0)


def test_a_filtered_target_may_be_computed_in_parts() -> None:
    losses = []
    for accumulate in (1, 4):
        config = tiny("digits_swav", global_batch=ROWS, accumulate=accumulate)
        step = new_step(configure(config, "target_s-1"))
        step.method.eval()
        losses.append(torch.stack([step(batch(ROWS, i), i).loss for i in range(4, 7)]))
    torch.testing.assert_close(*losses, atol=2e-5, rtol=0)


# ---- state -------------------------------------------------------------------------------------


def with_prototypes(config: Config, **changed: Any) -> Config:
    return replace(config, prototypes=replace(config.prototypes, **changed))


def eval_step(name: str, accumulate: int = 1, **changed: Any) -> TrainStep:
    """Its batch norms are frozen, so a batch may be computed in parts."""
    step = new_step(
        with_prototypes(tiny(name, global_batch=ROWS, accumulate=accumulate), **changed)
    )
    step.method.eval()
    return step


def _centers(accumulate: int) -> list[Tensor]:
    """The center after four steps, and as the moving mean of the target's logits."""
    step = eval_step("digits_dino", accumulate)
    method: Any = step.method
    expected = torch.zeros_like(method.center)
    for i in range(4, 8):
        whole = batch(ROWS, seed=i)
        with torch.no_grad():
            rows = torch.cat([whole.view1, whole.view2])
            z = unit_rows(method.target_projector(method.target_backbone(rows)))
            expected = 0.9 * expected + 0.1 * method.target_prototypes(z).mean(dim=0)
        assert step(own_rows(whole), i).applied
    return [method.center.clone(), expected]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_center_is_the_moving_mean_of_the_logits(accumulate: int) -> None:
    torch.testing.assert_close(*_centers(accumulate), atol=1e-6, rtol=0)


def _state_of_rank() -> list[Tensor]:
    return [*_centers(1), *_centers(2), *_queued()]


def _queued() -> list[Tensor]:
    """The queue after five steps, oldest row first, and the last rows of all ranks' targets."""
    size = 3 * ROWS
    step = eval_step("digits_swav", queue=size)
    seen = [gather_rows(step(own_rows(batch(ROWS, i)), i).branches.target) for i in range(4, 9)]
    queue: Any = step.method.queue
    assert int(queue.seen) == 5 * ROWS
    at = (queue.seen + torch.arange(size)) % size
    return [queue.rows[:, at], torch.cat(seen, dim=1)[:, -size:]]


def test_the_queue_holds_the_last_rows_of_either_view() -> None:
    found, expected = _queued()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_center_and_queue_are_those_of_the_global_batch(world: int, tmp_path: Path) -> None:
    alone = _queued()[0]
    ranks = run_ranks(world, _state_of_rank, tmp_path=tmp_path)
    for once, mean, parts, mean_of_parts, queue, rows in ranks:
        torch.testing.assert_close(once, mean, atol=1e-6, rtol=0)
        torch.testing.assert_close(parts, mean_of_parts, atol=1e-6, rtol=0)
        assert torch.equal(queue, rows)
        torch.testing.assert_close(queue, alone, atol=1e-4, rtol=0)
        assert torch.equal(once, ranks[0][0]) and torch.equal(queue, ranks[0][4])


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("name", ["digits_dino", "digits_swav"])
def test_prototypes_and_their_optimizer_state_stay_until_the_epoch_ends(
    name: str, optimizer: str
) -> None:
    config = tiny(name, global_batch=ROWS, optimizer=optimizer, weight_decay=0.1, warmup_epochs=0.0)
    step = new_step(with_prototypes(config, frozen_epochs=1.25))
    weight = step.method.prototypes.weight
    before, head = weight.detach().clone(), step.method.projector[0].weight.detach().clone()
    for i in range(5):  # four an epoch
        step(batch(ROWS, seed=i), i)
        assert torch.equal(weight, before)
        assert all((x == 0).all() for x in step.optimizer.state[weight].values())
    assert not torch.equal(step.method.projector[0].weight, head)
    step(batch(ROWS, seed=5), 5)
    assert (weight != before).all(dim=1).all()


def test_a_frozen_step_moves_nothing_else_otherwise() -> None:
    frozen, free = (
        new_step(with_prototypes(tiny("digits_swav", global_batch=ROWS), frozen_epochs=epochs))
        for epochs in (1, 0)
    )
    for step in (frozen, free):
        step(batch(ROWS), 3)
    state = free.method.state_dict()
    for key, tensor in frozen.method.state_dict().items():
        assert torch.equal(tensor, state[key]) == (key != "prototypes.weight"), key


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_leaves_the_queue(accumulate: int) -> None:
    step = eval_step("digits_swav", accumulate, queue=2 * ROWS)
    step(batch(ROWS), 4)
    before = {key: x.clone() for key, x in step.method.state_dict().items()}
    assert before["queue.rows"].any()
    bad = batch(ROWS, seed=1)
    bad.view1[3] = float("nan")
    assert not step(bad, 5).applied
    assert all(torch.equal(x, before[key]) for key, x in step.method.state_dict().items())


STATEFUL = {
    "digits_dino": {"teacher_temp_epochs": 1.5, "teacher_temp": 0.07},
    "digits_swav": {"queue": 672, "queue_epoch": 1.0},
}


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize(
    "stops", [[1, 3, 4, 6], pytest.param(list(range(1, 8)), marks=pytest.mark.slow)], ids=len
)
def test_a_run_stopped_anywhere_ends_as_an_undisturbed_one(
    name: str, stops: list[int], tmp_path: Path
) -> None:
    """Across the end of the first epoch, where the prototypes begin to move, and while the queue
    fills and after it is used."""
    config = with_prototypes(tiny(name), **STATEFUL[name])
    run(tmp_path / "whole", config)
    run_with_stops(tmp_path / "stopped", config, stops)
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")


# ---- settings ----------------------------------------------------------------------------------


def test_the_target_s_temperature_rises_linearly_over_its_epochs() -> None:
    method = make(Dino, replace(DINO, teacher_temp=0.07, teacher_temp_epochs=3))
    for step, expected in ((0, 0.04), (2, 0.045), (6, 0.055), (12, 0.07), (99, 0.07)):
        method.schedule(step, 4)
        assert float(method.target_temperature) == pytest.approx(expected)


def test_dino_s_head_has_gelu_biases_and_no_batch_norm() -> None:
    config = tiny("digits_dino")
    model = replace(config.model, projector_hidden_bn=False, projector_hidden=128)
    head = build_method(replace(config, model=model)).projector
    kinds = [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert [type(layer) for layer in head] == kinds
    for layer in head[::2]:
        assert (layer.bias == 0).all()
    assert head[2].weight.std().item() == pytest.approx(0.02, rel=0.02)


REFUSED = [
    ("digits_dino", {"predictor": "mlp"}, "predictor=mlp"),
    (
        "digits_dino",
        {
            "predictor": "spectral",
            "filter": FilterConfig(location="target", sigma=-1.0, basis="online"),
        },
        "filter.basis",
    ),
    (
        "digits_swav",
        {
            "predictor": "spectral",
            "filter": FilterConfig(location="online", sigma=1.0),
            "optim": OptimConfig(accumulate=2),
        },
        "optim.accumulate=2",
    ),
    ("digits_swav", {"predictor": "mlp"}, "predictor=mlp"),
    ("digits_swav", {"teacher_temp": 0.07}, "prototypes.teacher_temp"),
    ("digits_swav", {"teacher_temp_start": 0.05}, "prototypes.teacher_temp_start"),
    ("digits_swav", {"teacher_temp_epochs": 5.0}, "prototypes.teacher_temp_epochs"),
    ("digits_swav", {"centring": "mean"}, "prototypes.centring"),
    ("digits_swav", {"epsilon": 0.02}, "prototypes.epsilon"),
    (
        "digits_dino",
        {"centring": "sinkhorn", "teacher_temp_start": 0.02},
        "prototypes.teacher_temp",
    ),
    ("digits_dino", {"queue": 400}, "prototypes.queue"),
    ("digits_swav", {"centring": "none", "queue": 400}, "prototypes.queue"),
    ("digits_swav", {"queue": 500}, "use 400 or 600"),
    ("digits_swav", {"queue": 100}, "use 200"),
    ("digits_swav", {"count": 1}, "prototypes.count"),
    ("digits_dino", {"temperature": 0.0}, "prototypes.temperature"),
]


@pytest.mark.parametrize(("name", "changed", "named"), REFUSED)
def test_settings_that_do_not_fit_are_named(name: str, changed: Any, named: str) -> None:
    with refused(UsageError, named):
        if "predictor" in changed:
            replace(recipe(name), **changed)
        else:
            with_prototypes(recipe(name), **changed)
