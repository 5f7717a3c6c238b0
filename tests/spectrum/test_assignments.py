"""Spectra of DINO's and SwAV's outputs against the measures of whole matrices."""

from dataclasses import replace
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_fast.runtime.distributed import local_rows
from rdm_fast.spectrum import (
    PrototypeOutputs,
    alignment,
    assignment_spectra,
    assignments,
    directions,
    effective_rank,
    eigenvalues,
    measured_response,
)
from tests.ranks import run_ranks

B, K, D = 12, 20, 6
T, T_TARGET = 0.1, 0.05
PARTS = ("ema", "sharpening", "centring")


def step(k: int = K) -> tuple[PrototypeOutputs, Tensor, Tensor]:
    """PrototypeOutputs, projections and the target's logits, as those of a batch of B rows."""
    generator = torch.Generator().manual_seed(3)
    z, noise = torch.randn(2, 2, B, D, generator=generator, dtype=torch.float64)
    C = F.normalize(torch.randn(k, D, generator=generator, dtype=torch.float64), dim=1)
    z, older = F.normalize(z, dim=-1), F.normalize(z + 0.3 * noise, dim=-1)
    center = torch.randn(k, generator=generator, dtype=torch.float64) * 0.1
    target_logits = older @ C.mT
    q = ((target_logits - center) / T_TARGET).softmax(dim=-1)
    outputs = PrototypeOutputs(
        z @ C.mT, q, T, torch.tensor(T_TARGET, dtype=torch.float64), True, "centring", center
    )
    return outputs, z, target_logits


def mean_eigenvalues(rows: Tensor) -> Tensor:
    return torch.stack([eigenvalues(each) for each in rows]).mean(dim=0)


@pytest.mark.parametrize("k", [K, 7])
@pytest.mark.parametrize("block", [5, 4096])
def test_all_are_the_measures_of_the_whole_matrices(
    k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignments, "BLOCK", block)
    outputs, z, target_logits = step(k)
    found = assignment_spectra(outputs, z, target_logits)
    p, q = (outputs.online / T).softmax(dim=-1), outputs.target
    plain = (target_logits / T).softmax(dim=-1)
    close: Any = torch.testing.assert_close
    close(found.online, mean_eigenvalues(p), atol=1e-12, rtol=0)
    close(found.target, mean_eigenvalues(q), atol=1e-12, rtol=0)
    close(found.projection, mean_eigenvalues(z), atol=1e-12, rtol=0)
    assert found.profile is not None
    axes = [directions(each) for each in plain]
    responses = [measured_response(*each) for each in zip(plain, q, axes, strict=True)]
    close(found.profile.response, torch.stack(responses).mean(dim=0), atol=1e-6, rtol=1e-6)
    close(found.profile.s, torch.stack([each.s for each in axes]).mean(dim=0), atol=1e-9, rtol=0)
    aligned = [alignment(a, directions(b)) for a, b in zip(p, q, strict=True)]
    close(found.profile.alignment, torch.stack(aligned).mean(), atol=1e-6, rtol=0)
    logged = found.metrics()
    for key, rows in {
        "logits_online": outputs.online, "logits_target": target_logits - outputs.center,
        "online_centred": p - p.mean(dim=1, keepdim=True),
        "target_centred": q - q.mean(dim=1, keepdim=True),
    }.items():  # fmt: skip
        expected = float(effective_rank(mean_eigenvalues(rows)))
        assert logged[f"effective_rank/{key}"] == pytest.approx(expected, rel=1e-6)
    sharp = (target_logits / T_TARGET).softmax(dim=-1)
    ranks = [float(effective_rank(mean_eigenvalues(rows))) for rows in (p, plain, sharp, q)]
    parts = [logged[f"rank_difference/{part}"] for part in PARTS]
    assert parts == pytest.approx([b - a for a, b in pairwise(ranks)], abs=1e-9)
    assert sum(parts) == pytest.approx(logged["rank_difference"], abs=1e-9)
    cross = -(q * p.log()).sum(dim=-1).mean()
    softness = [-(x * x.log()).sum(dim=-1).mean() for x in (p, q)]
    assert logged["kl"] == pytest.approx(float(cross - softness[1]), abs=1e-12)
    entropies = [logged["entropy/online"], logged["entropy/target"]]
    assert entropies == pytest.approx([float(each) / log(k) for each in softness])
    assert logged["teacher_temp"] == T_TARGET
    assert logged["center_norm"] == pytest.approx(float(outputs.center.norm()))  # type: ignore[union-attr]


def test_a_plain_line_has_no_attribution_and_the_same_numbers_else() -> None:
    outputs, z, target_logits = step()
    plain, profiled = (assignment_spectra(outputs, z, each) for each in (None, target_logits))
    assert plain.profile is None
    assert plain.metrics().items() < profiled.metrics().items()
    assert not [key for key in plain.metrics() if key.startswith("rank_difference/")]


def test_without_averaged_weights_and_with_sinkhorn_two_parts_add_up() -> None:
    outputs, z, _ = step()
    logits = outputs.online.flip(0)
    plain = replace(outputs, averaged=False, map="equipartition", center=None)
    found = assignment_spectra(plain, z, logits).metrics()
    parts = {key: value for key, value in found.items() if key.startswith("rank_difference/")}
    assert list(parts) == ["rank_difference/sharpening", "rank_difference/equipartition"]
    assert sum(parts.values()) == pytest.approx(found["rank_difference"], abs=1e-9)
    assert "center_norm" not in found


def test_the_rank_of_one_hot_targets_is_their_perplexity_and_that_of_uniform_ones_is_1() -> None:
    outputs, z, _ = step()
    drawn = torch.tensor([[0] * 6 + [1] * 3 + [2] * 3, [4] * 9 + [7] * 2 + [9]])
    shares = (torch.tensor([6, 3, 3]) / 12, torch.tensor([9, 2, 1]) / 12)
    expected = [float((-(each * each.log()).sum()).exp()) for each in shares]
    found = assignment_spectra(replace(outputs, target=F.one_hot(drawn, K).double()), z)
    assert found.metrics()["perplexity/target"] == pytest.approx(sum(expected) / 2)
    assert found.metrics()["entropy/target"] == 0
    same = torch.stack([F.one_hot(drawn[0], K).double()] * 2)
    found = assignment_spectra(replace(outputs, target=same), z)
    assert found.metrics()["effective_rank/target"] == pytest.approx(expected[0])
    uniform = torch.full_like(outputs.target, 1 / K)
    metrics = assignment_spectra(replace(outputs, target=uniform), z).metrics()
    assert metrics["effective_rank/target"] == pytest.approx(1)
    assert metrics["entropy/target"] == pytest.approx(1)
    assert metrics["perplexity/target"] == pytest.approx(K)


def test_an_output_without_weight_on_a_prototype_has_a_finite_divergence() -> None:
    outputs, z, _ = step()
    online = outputs.online.float().clone()
    online[..., 0] = -1e4
    found = assignment_spectra(replace(outputs, online=online), z).metrics()
    assert all(map(torch.isfinite, map(torch.tensor, found.values())))


def test_rows_that_are_not_finite_give_nan_and_no_error() -> None:
    outputs, z, target_logits = step()
    target_logits[0, 0, 0] = torch.nan
    q = ((target_logits - outputs.center) / T_TARGET).softmax(dim=-1)  # type: ignore[operator]
    found = assignment_spectra(replace(outputs, target=q), z, target_logits)
    assert found.target.isnan().all() and found.online.isfinite().all()
    assert found.profile is not None and found.profile.response.isnan().all()


def test_gram_matrices_take_the_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, z, _ = step()
    monkeypatch.setattr(assignments, "ROWS", 8)
    found = assignment_spectra(outputs, z)
    torch.testing.assert_close(found.target, mean_eigenvalues(outputs.target[:, :8]))
    whole = step()[0]
    monkeypatch.undo()
    all_rows = assignment_spectra(whole, z).metrics()
    assert found.metrics()["perplexity/target"] == all_rows["perplexity/target"]


def _of_rank() -> dict[str, float]:
    outputs, z, target_logits = step()
    own = local_rows(B // torch.distributed.get_world_size())
    local = replace(outputs, online=outputs.online[:, own], target=outputs.target[:, own])
    return assignment_spectra(local, z[:, own], target_logits[:, own]).metrics()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks_measure_the_global_batch(world: int, tmp_path: Path) -> None:
    expected = assignment_spectra(*step()).metrics()
    for found in run_ranks(world, _of_rank, tmp_path=tmp_path):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def _target_of_rank(rows: int) -> Tensor:
    assignments.ROWS = rows
    outputs, z, _ = step()
    own = local_rows(B // torch.distributed.get_world_size())
    local = replace(outputs, online=outputs.online[:, own], target=outputs.target[:, own])
    return assignment_spectra(local, z[:, own]).target


def test_every_rank_gives_its_share_of_the_rows(tmp_path: Path) -> None:
    taken = step()[0].target[:, [0, 1, 2, 3, 6, 7, 8, 9]]
    for found in run_ranks(2, _target_of_rank, 8, tmp_path=tmp_path):
        torch.testing.assert_close(found, mean_eigenvalues(taken), atol=1e-12, rtol=0)
