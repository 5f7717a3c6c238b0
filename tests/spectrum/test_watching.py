"""spectrum.watch on other people's models."""

import copy
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdm_fast import FilterConfig, SpectralPredictor
from rdm_fast.spectrum import directions, effective_rank, eigenvalues, watch
from rdm_fast.spectrum.measures import attainable_rank, channel_std
from tests.ranks import run_ranks
from tests.spies import refused


class SomebodysSimSiam(nn.Module):
    def __init__(self, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU())
        self.projection_head = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))
        self.prediction_head = predictor or nn.Sequential(
            nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.prediction_head(self.projection_head(self.backbone(x)))


def images(n: int = 32) -> Tensor:
    return torch.randn(n, 1, 4, 4)


def test_heads_are_found_by_name_and_measured() -> None:
    model, x = SomebodysSimSiam(), images()
    with watch(model, every=1) as spectra:
        p = model(x)
    z = model.projection_head(model.backbone(x))
    heads = {"projection_head": z, "prediction_head": p}
    for record, (name, rows) in zip(spectra.records, heads.items(), strict=True):
        expected = eigenvalues(rows.detach())
        assert (record.name, record.call) == (name, 1)
        torch.testing.assert_close(record.eigenvalues, expected.flip(0), rtol=1e-9, atol=1e-12)
        rank = float(effective_rank(expected))
        assert record.effective_rank == pytest.approx(rank)
        assert record.share == pytest.approx(rank / int(attainable_rank(rows.detach())))
        assert record.std == pytest.approx(float(channel_std(rows.detach())))
    assert spectra.records[0].response is None  # 12 channels in, 8 out


def test_logits_are_measured_after_their_softmax_or_with_a_warning() -> None:
    model, x = nn.Sequential(nn.Flatten()), images()
    model.prototypes = nn.Linear(16, 16, bias=False)
    with watch(model, "prototypes", every=1, temperature=0.1) as spectra:
        logits = model(x)
    (record,) = spectra.records
    expected = eigenvalues((logits / 0.1).softmax(dim=1).detach())
    torch.testing.assert_close(record.eigenvalues, expected.flip(0), rtol=1e-5, atol=1e-9)
    assert record.response is None
    with pytest.warns(UserWarning, match="temperature=0.1"), watch(model, "prototypes"):
        pass
    with refused(ValueError, "temperature"):
        watch(model, temperature=0.0)


def test_a_predictor_is_measured_as_a_filter() -> None:
    model = SomebodysSimSiam(SpectralPredictor(FilterConfig(kind="log_1"))).double()
    x = images().double()
    with watch(model, "prediction_head", every=1) as spectra:
        model(x)
    (record,) = spectra.records
    s = directions(model.projection_head(model.backbone(x))).s
    assert record.s is not None and record.response is not None
    torch.testing.assert_close(record.s, s, rtol=1e-9, atol=0)
    torch.testing.assert_close(record.response, s.log1p(), rtol=1e-6, atol=0)


def test_every_nth_pass_in_training_mode_is_recorded() -> None:
    model = SomebodysSimSiam()
    seen: list[int] = []
    handle = watch(model, "projection_head", every=3, on_record=lambda r: seen.append(r.call))
    for _ in range(4):
        model(images())
        model.eval()(images())
        model.train()
    for _ in range(4):
        model(images())
    assert seen == [record.call for record in handle.records] == [1, 4, 7]
    handle.remove()
    model(images())
    handle.remove()
    assert len(handle.records) == 3


def test_a_watched_model_trains_to_the_same_bits() -> None:
    model = SomebodysSimSiam()
    twin, x = copy.deepcopy(model), images()
    watch(twin, every=1)
    for each in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            each(x).square().mean().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_mistakes_are_refused() -> None:
    model = SomebodysSimSiam()
    with refused(ValueError, "projektor", "SomebodysSimSiam"):
        watch(model, "projektor")
    with refused(ValueError):
        watch(model, every=0)
    pair = nn.Module()
    pair.forward = types.MethodType(lambda self, x: (x, x), pair)  # type: ignore[method-assign]
    for module, found in ((nn.Conv2d(1, 2, 3), "(3, 2, 2, 2)"), (pair, "tuple")):
        with watch(module), refused(ValueError, found):
            module(images(3))


def _watched_on_this_rank() -> list[Tensor]:
    """Of this rank's rows, and of all ranks'."""
    z = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    module = nn.Identity()
    alone, together = watch(module), watch(module, all_ranks=True)
    module(z.chunk(dist.get_world_size())[dist.get_rank()])
    assert alone.records[0].name == ""  # a plain module is watched itself
    return [handle.records[0].eigenvalues for handle in (alone, together)]


def test_all_ranks_measures_the_rows_of_every_rank(tmp_path: Path) -> None:
    z = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    for rank, found in enumerate(run_ranks(2, _watched_on_this_rank, tmp_path=tmp_path)):
        for values, rows in zip(found, (z.chunk(2)[rank], z), strict=True):
            torch.testing.assert_close(values, eigenvalues(rows).flip(0), rtol=1e-9, atol=0)
