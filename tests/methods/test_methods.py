"""Each method against its loss written out, and the path of its gradient."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_fast.config import FilterConfig
from rdm_fast.filters import loss as loss_module
from rdm_fast.filters.loss import NegativeCosine, SpectralCosine, spectral_loss
from rdm_fast.methods import Byol, Method, SimSiam, SymSimSiam, build_method
from rdm_fast.runtime.distributed import rank, world_size
from tests.ranks import run_ranks
from tests.spies import calls_of
from tests.tiny import METHODS, batch, tiny, with_small_views

B, WIDTH, D = 12, 10, 6
FILTERS = [FilterConfig(), FilterConfig(location="target", sigma=-1.0)]
BY_ONLINE = FilterConfig(location="target", sigma=-1.0, basis="online")


def views(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, WIDTH, generator=generator)
    return x, x + 0.5 * torch.randn(B, WIDTH, generator=generator)


def make(kind: type[Method], config: FilterConfig | None = None) -> Any:
    """A method of linear layers with a filter or, without one, an MLP predictor (SymSimSiam: none).

    BYOL's target weights differ from the online ones.
    """
    torch.manual_seed(0)
    backbone, projector = nn.Linear(WIDTH, 8), nn.Linear(8, D)
    if kind is SymSimSiam:
        return SymSimSiam(backbone, projector)
    mlp = nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, D))
    parts = (mlp, NegativeCosine()) if config is None else (nn.Identity(), SpectralCosine(config))
    method: Any = kind(backbone, projector, *parts)
    if kind is Byol:
        with torch.no_grad():
            for p in [*method.target_backbone.parameters(), *method.target_projector.parameters()]:
                p.add_(0.1)
    return method


def projections(method: Any, *shown: Tensor) -> list[Tensor]:
    return [method.projector(method.backbone(view)) for view in shown or views()]


def targets(method: Any, *shown: Tensor) -> list[Tensor]:
    return [
        method.target_projector(method.target_backbone(view)).detach() for view in shown or views()
    ]


def cosine(p: Tensor, z: Tensor) -> Tensor:
    return F.cosine_similarity(p, z, dim=1).mean()


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, parameters))


def assert_same(method: Method, written_out: Tensor, *shown: Tensor) -> None:
    """Losses and gradients; sums of some dozen float32 cosines of order 1."""
    loss = method(*(shown or views())).loss
    torch.testing.assert_close(loss, written_out, atol=3e-6, rtol=0)
    for ours, theirs in zip(gradients(loss, method), gradients(written_out, method), strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-4)


def test_simsiam_and_byol_are_the_papers_formulas() -> None:
    method = make(SimSiam)
    (z1, z2), (p1, p2) = projections(method), map(method.predictor, projections(method))
    assert_same(method, -cosine(p1, z2.detach()) / 2 - cosine(p2, z1.detach()) / 2)
    method = make(Byol)
    (t1, t2), (p1, p2) = targets(method), map(method.predictor, projections(method))
    assert_same(method, (2 - 2 * cosine(p1, t2)) + (2 - 2 * cosine(p2, t1)))


@pytest.mark.parametrize("config", FILTERS, ids=lambda c: c.location)
def test_filtered_methods_are_the_spectral_loss_of_their_branches(config: FilterConfig) -> None:
    method = make(SimSiam, config)
    z1, z2 = projections(method)
    assert_same(method, spectral_loss(z1, z2, config))
    method = make(Byol, config)
    (z1, z2), (t1, t2) = projections(method), targets(method)
    assert_same(method, 4 + 4 * spectral_loss(z1, z2, config, targets=(t1, t2)))


def test_symsimsiam_is_symmetric_and_centered() -> None:
    method = make(SymSimSiam)
    z1, z2 = projections(method)
    assert_same(method, -cosine(z1 - z1.mean(0), z2 - z2.mean(0)))
    before = method(*views()).loss
    with torch.no_grad():
        method.projector.bias.add_(5.0)  # one large constant must not win the loss
    torch.testing.assert_close(method(*views()).loss, before, atol=1e-5, rtol=0)


def literal_filter(z: Tensor, config: FilterConfig) -> Tensor:
    """W = V S^sigma V^T of the rows z, without gradient."""
    _, s, Vt = torch.linalg.svd(z.detach(), full_matrices=False)
    return Vt.mT * s**config.sigma @ Vt


def literal_pair(method: Any, z: Tensor, target: Tensor, config: FilterConfig | None) -> Tensor:
    """-cos of the online output for projections z with a target."""
    if config is None:
        return -cosine(method.predictor(z), target)
    if config.location == "online":
        return -cosine(z @ literal_filter(z, config), target)
    basis = z if config.basis == "online" else target
    return -cosine(z, target @ literal_filter(basis, config))


def written_out_pairs(
    method: Any, shown: list[Tensor], pair: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The loss of a method from that of every view with each target of another view."""
    online = projections(method, *shown)
    of_target = targets(method, *shown[:2]) if isinstance(method, Byol) else online[:2]
    losses = [
        pair(z, target.detach())
        for v, z in enumerate(online)
        for t, target in enumerate(of_target)
        if v != t
    ]
    assert len(losses) == 2 + 2 * (len(shown) - 2)
    mean = torch.stack(losses).mean()
    return 4 + 4 * mean if isinstance(method, Byol) else mean


def with_small(n: int) -> list[Tensor]:
    return [*views(), *(views(seed)[0] for seed in range(2, 2 + n))]


@pytest.mark.parametrize(
    "config", [None, *FILTERS, BY_ONLINE], ids=["mlp", "online", "target", "target by online"]
)
@pytest.mark.parametrize("n_small", [0, 2])
@pytest.mark.parametrize("kind", [SimSiam, Byol])
def test_small_views_are_matched_with_both_targets_in_float64(
    kind: type[Method], n_small: int, config: FilterConfig | None
) -> None:
    method = make(kind, config).double()
    shown = [view.double() for view in with_small(n_small)]
    loss = method(*shown).loss
    literal = written_out_pairs(method, shown, lambda z, t: literal_pair(method, z, t, config))
    torch.testing.assert_close(loss, literal, atol=1e-12, rtol=0)
    for ours, theirs in zip(gradients(loss, method), gradients(literal, method), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)


def test_without_predictor_and_filter_too_small_views_are_no_targets() -> None:
    method = SimSiam(nn.Linear(WIDTH, 8), nn.Linear(8, D), nn.Identity(), NegativeCosine())
    shown = with_small(2)
    assert_same(method, written_out_pairs(method, shown, lambda z, t: -cosine(z, t)), *shown)


@pytest.mark.parametrize(
    "config",
    [*FILTERS, BY_ONLINE, FilterConfig(sigma=1.0, engine="gemm"),
     FilterConfig(location="target", sigma=-0.5, engine="reference")],
    ids=["online", "target", "target by online", "gemm", "reference"],
)  # fmt: skip
@pytest.mark.parametrize("n_small", [1, 3])
@pytest.mark.parametrize("kind", [SimSiam, Byol])
def test_the_filter_of_each_view_is_computed_once_by_every_engine(
    kind: type[Method], n_small: int, config: FilterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, shown = make(kind, config), with_small(n_small)
    alone = SpectralCosine(config)
    literal = written_out_pairs(method, shown, lambda z, t: alone(z[None], t[None])[0])
    assert_same(method, literal, *shown)
    built = calls_of(monkeypatch, loss_module, "build_filter")
    method(*shown)
    own_target = config.location == "target" and config.basis == "own"
    assert [len(X) for _, X, *_ in built] == [2 if own_target else 2 + n_small]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "digits_symsimsiam"])
def test_targets_never_see_small_views_and_batch_norms_see_one_view_at_a_time(name: str) -> None:
    method: Any = build_method(with_small_views(name))
    shown = batch(16, size=16, small=2).views
    sizes: dict[str, list[int]] = {"backbone": [], "target_backbone": []}
    for part in [part for part in sizes if hasattr(method, part)]:
        norm = getattr(method, part).bn1
        norm.register_forward_hook(lambda _, x, y, part=part: sizes[part].append(x[0].shape[-1]))
    branches = method.branches(*shown)
    assert [len(rows) for rows in (branches.online, branches.target, branches.projection)] == [
        4, 2, 2,
    ]  # fmt: skip
    assert sizes["backbone"] == [view.shape[-1] for view in shown]
    assert len(set(sizes["backbone"])) == 2
    has_target = "target" in method.encoders
    assert has_target == tiny(name).has_target == ("byol" in name or "dino" in name)
    assert sizes["target_backbone"] == (sizes["backbone"][:2] if has_target else [])
    if not has_target:
        assert torch.equal(branches.target, branches.projection.flip(0))


def test_byols_target_starts_as_a_copy_has_no_gradient_and_follows() -> None:
    method = Byol(nn.Linear(WIDTH, 8), nn.Linear(8, D), nn.Identity(), NegativeCosine())
    assert torch.equal(method.target_backbone.weight, method.backbone.weight)
    method(*views()).loss.backward()
    assert all(p.grad is None for p in method.target_backbone.parameters())
    before = method.target_backbone.weight.clone()
    with torch.no_grad():
        method.backbone.weight.add_(1.0)
    method.update_target(0.75, method.branches(*views()))
    torch.testing.assert_close(method.target_backbone.weight, before + 0.25)


@pytest.mark.parametrize("name", METHODS)
def test_built_methods_continue_from_the_gradient_of_the_online_branch(name: str) -> None:
    config = tiny(name)
    method = build_method(config)
    assert type(method).__name__.lower() == config.method
    assert isinstance(method.predictor, nn.Identity) == (config.predictor != "mlp")
    assert (method.criterion.filter is not None) == (config.predictor == "spectral")
    assert not any(key.startswith("criterion") for key in method.state_dict())
    x = torch.randn(16, 1, 8, 8)
    direct = gradients(method(x, x.flip(3)).loss, method)
    branches = method(x, x.flip(3)).branches
    online = branches.online.detach().requires_grad_()
    method.loss(online, branches.target).backward()
    continued = gradients(method(x, x.flip(3), online_gradient=online.grad).loss, method)
    for one, other in zip(direct, continued, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def _losses_and_gradients() -> list[Tensor]:
    """Of this rank's rows, for each method whose criterion sees the whole batch."""
    results = []
    for method, n_small in (
        (make(SymSimSiam), 0), *((make(SimSiam, f), n) for f in FILTERS for n in (0, 2)),
        *((make(Byol, f), 0) for f in FILTERS), (make(Byol, FILTERS[1]), 2),
    ):  # fmt: skip
        loss = method(*(v.chunk(world_size())[rank()] for v in with_small(n_small))).loss
        results += [loss.detach(), *gradients(loss, method)]
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_averaging_ranks_gives_the_gradient_of_the_global_batch(world: int, tmp_path: Path) -> None:
    ranks = run_ranks(world, _losses_and_gradients, tmp_path=tmp_path)
    for of_ranks, expected in zip(zip(*ranks, strict=True), _losses_and_gradients(), strict=True):
        torch.testing.assert_close(torch.stack(of_ranks).mean(0), expected, atol=1e-6, rtol=1e-5)
