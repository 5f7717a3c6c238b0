"""Each method against its loss written out, and where its gradient goes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_fast import spectral_loss
from rdm_fast.config import FilterConfig
from rdm_fast.filters import loss as spectral
from rdm_fast.filters.loss import NegativeCosine, SpectralCosine
from rdm_fast.methods import Byol, Method, SimSiam, SymSimSiam, build_method
from tests.ranks import run_ranks
from tests.tiny import METHODS, tiny

B, WIDTH, D = 12, 10, 6


def encoder() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, 8), nn.Linear(8, D)


def views(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, WIDTH, generator=generator)
    return x, x + 0.5 * torch.randn(B, WIDTH, generator=generator)


def cosine(p: Tensor, z: Tensor) -> Tensor:
    return F.cosine_similarity(p, z, dim=1).mean()


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, parameters))


def assert_same_gradients(method: Method, written_out: Tensor) -> None:
    """Sums of a dozen float32 cosines of order 1."""
    loss = method(*views()).loss
    torch.testing.assert_close(loss, written_out, atol=1e-6, rtol=0)
    for ours, theirs in zip(gradients(loss, method), gradients(written_out, method), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_simsiam_is_the_paper_formula() -> None:
    predictor = nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, D))
    method = SimSiam(*encoder(), predictor, NegativeCosine())
    z1, z2 = (method.projector(method.backbone(v)) for v in views())
    p1, p2 = predictor(z1), predictor(z2)
    assert_same_gradients(method, -cosine(p1, z2.detach()) / 2 - cosine(p2, z1.detach()) / 2)


@pytest.mark.parametrize(
    "filter", [FilterConfig(sigma=1.0), FilterConfig(location="target", sigma=-1.0)]
)
def test_rdm_simsiam_is_the_spectral_loss_of_the_projections(filter: FilterConfig) -> None:
    method = SimSiam(*encoder(), nn.Identity(), SpectralCosine(filter))
    z1, z2 = (method.projector(method.backbone(v)) for v in views())
    assert_same_gradients(method, spectral_loss(z1, z2, filter))


def byol(predictor: nn.Module | FilterConfig) -> Byol:
    if isinstance(predictor, FilterConfig):
        return Byol(*encoder(), nn.Identity(), SpectralCosine(predictor))
    return Byol(*encoder(), predictor, NegativeCosine())


def moved_byol(predictor: nn.Module | FilterConfig) -> Byol:
    """A BYOL whose target weights have come apart from the online ones."""
    method = byol(predictor)
    with torch.no_grad():
        for p in [*method.target_backbone.parameters(), *method.target_projector.parameters()]:
            p.add_(0.1)
    return method


def test_byol_is_the_paper_formula() -> None:
    predictor = nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, D))
    method = moved_byol(predictor)
    p1, p2 = (predictor(method.projector(method.backbone(v))) for v in views())
    t1, t2 = (method.target_projector(method.target_backbone(v)) for v in views())
    assert_same_gradients(method, (2 - 2 * cosine(p1, t2)) + (2 - 2 * cosine(p2, t1)))


@pytest.mark.parametrize(
    "filter", [FilterConfig(sigma=1.0), FilterConfig(location="target", sigma=-1.0)]
)
def test_rdm_byol_filters_with_the_spectrum_of_the_branch_it_acts_on(filter: FilterConfig) -> None:
    method = moved_byol(filter)
    z1, z2 = (method.projector(method.backbone(v)) for v in views())
    targets = tuple(method.target_projector(method.target_backbone(v)).detach() for v in views())
    written_out = 4 + 4 * spectral_loss(z1, z2, filter, targets=(targets[0], targets[1]))
    assert_same_gradients(method, written_out)


def written_out_pairs(method: Byol, shown: list[Tensor], config: FilterConfig | None) -> Tensor:
    """2 - 2 cos for every view with each target of another one, pair by pair; twice their mean."""
    z = [method.projector(method.backbone(v)) for v in shown]
    targets = [method.target_projector(method.target_backbone(v)).detach() for v in shown[:2]]
    losses = []
    for v, projections in enumerate(z):
        for t, target in enumerate(targets):
            if v == t:
                continue
            if config is None:
                losses.append(2 - 2 * cosine(method.predictor(projections), target))
            else:
                paired = SpectralCosine(config)(projections[None], target[None])
                losses.append(2 + 2 * paired[0])
    assert len(losses) == 2 + 2 * (len(shown) - 2)
    return 2 * torch.stack(losses).mean()


@pytest.mark.parametrize(
    "config",
    [
        None,
        FilterConfig(sigma=1.0),
        FilterConfig(location="target", sigma=-1.0),
        FilterConfig(location="target", sigma=-1.0, basis="online"),
        FilterConfig(sigma=1.0, engine="gemm"),
        FilterConfig(location="target", sigma=-0.5, engine="reference"),
    ],
    ids=["mlp", "online", "target", "target by online", "gemm", "reference"],
)
@pytest.mark.parametrize("n_small", [1, 3])
def test_byol_matches_small_views_with_both_targets(
    config: FilterConfig | None, n_small: int
) -> None:
    """Sums of some dozen float32 cosines of order 1."""
    method = moved_byol(nn.Linear(D, D) if config is None else config)
    shown = [*views(), *(views(seed)[0] for seed in range(2, 2 + n_small))]
    loss, expected = method(*shown).loss, written_out_pairs(method, shown, config)
    torch.testing.assert_close(loss, expected, atol=3e-6, rtol=0)
    for ours, theirs in zip(gradients(loss, method), gradients(expected, method), strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-4)


@pytest.mark.parametrize("config", [FilterConfig(), FilterConfig(location="target", sigma=-1.0)])
def test_a_filter_is_taken_once_of_each_view(
    config: FilterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    real = spectral.build_filter

    def build(engine: str, X: Tensor, *rest: Any, **options: Any) -> Any:
        taken.append(len(X))
        return real(engine, X, *rest, **options)

    monkeypatch.setattr(spectral, "build_filter", build)
    moved_byol(config)(*views(), views(2)[0], views(3)[0])
    assert taken == [4 if config.location == "online" else 2]


def test_byol_target_starts_as_a_copy_takes_no_gradient_and_follows() -> None:
    method = byol(FilterConfig())
    assert torch.equal(method.target_backbone.weight, method.backbone.weight)
    method(*views()).loss.backward()
    assert all(p.grad is None for p in method.target_backbone.parameters())
    before = method.target_backbone.weight.clone()
    with torch.no_grad():
        method.backbone.weight.add_(1.0)
    method.update_target(0.75)
    torch.testing.assert_close(method.target_backbone.weight, before + 0.25)


def test_symsimsiam_is_symmetric_centered_and_differentiates_both_branches() -> None:
    method = SymSimSiam(*encoder())
    z1, z2 = (method.projector(method.backbone(v)) for v in views())
    centered = cosine(z1 - z1.mean(0), z2 - z2.mean(0))
    assert_same_gradients(method, -centered)


def test_symsimsiam_ignores_a_common_offset() -> None:
    """Centering is what keeps the symmetric loss from being won by one large constant."""
    method = SymSimSiam(*encoder())
    before = method(*views()).loss
    with torch.no_grad():
        method.projector.bias.add_(5.0)
    torch.testing.assert_close(method(*views()).loss, before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_continuing_from_the_gradient_of_the_online_branch_is_the_same_backward(name: str) -> None:
    torch.manual_seed(0)
    method = build_method(tiny(name))
    x = torch.randn(16, 1, 8, 8)
    direct = gradients(method(x, x.flip(3)).loss, method)
    branches = method(x, x.flip(3)).branches
    online = branches.online.detach().requires_grad_()
    method.loss(online, branches.target).backward()
    continued = gradients(method(x, x.flip(3), online_gradient=online.grad).loss, method)
    for one, other in zip(direct, continued, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_the_named_methods_are_built(name: str) -> None:
    method = build_method(tiny(name))
    assert isinstance(method, {"simsiam": SimSiam, "byol": Byol}.get(tiny(name).method, SymSimSiam))
    assert isinstance(method.predictor, nn.Identity) == (tiny(name).predictor != "mlp")
    assert (method.criterion.filter is not None) == (tiny(name).predictor == "spectral")


def _rank_gradients() -> list[Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    results = []
    for method in methods():
        rows = [v.chunk(world)[rank] for v in views()]
        loss = method(*rows).loss
        results += [loss.detach(), *gradients(loss, method)]
    return results


def methods() -> list[Method]:
    return [
        SymSimSiam(*encoder()),
        SimSiam(
            *encoder(), nn.Identity(), SpectralCosine(FilterConfig(location="target", sigma=-1.0))
        ),
        moved_byol(FilterConfig()),
        moved_byol(FilterConfig(location="target", sigma=-0.5)),
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_averaging_over_ranks_gives_the_gradient_of_the_global_batch(
    world: int, tmp_path: Path
) -> None:
    ranks = run_ranks(world, _rank_gradients, tmp_path=tmp_path)
    averaged = [torch.stack(tensors).mean(0) for tensors in zip(*ranks, strict=True)]
    expected: list[Tensor] = []
    for method in methods():
        loss = method(*views()).loss
        expected += [loss.detach(), *gradients(loss, method)]
    for ours, theirs in zip(averaged, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
