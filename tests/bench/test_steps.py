"""bench.training, bench_step and bench.compare_peers: all rivals do the same work."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compare_peers, training
from bench.bench_step import percent
from bench.compare_peers import NO_LIGHTLY, RATIOS, REFERENCE, check, ratios_of, rivals_of
from bench.lightly_steps import MODELS, LightlyByol
from bench.report import peers, step
from bench.training import (
    CASES,
    SMALLEST,
    UNFILTERED,
    Turn,
    in_turns,
    noise,
    phases,
    ratio,
    spread,
    supervised_step,
    train_step,
)
from rdm_fast.optim import Lars

METHODS = ["simsiam", "rdm_simsiam", "byol", "rdm_byol", "symsimsiam"]


@pytest.mark.parametrize("method", METHODS)
def test_a_case_is_its_recipe_with_another_batch(method: str) -> None:
    for case in CASES.values():
        config = case.config(method)
        assert config.optim.global_batch == case.batch and config.augment.size == case.side
        assert config.model.backbone == case.backbone
        assert config.predictor == case.config(method + UNFILTERED).predictor
        if (case.recipes, case.backbone) != ("cifar10", "resnet8"):
            known = training.recipe(f"{case.recipes}_{method}")
            assert (config.model, config.filter) == (known.model, known.filter)


def test_every_step_moves_the_weights() -> None:
    """A step without its optimizer would look fast."""
    for method in METHODS:
        step = train_step(SMALLEST.config(method))
        before = [p.clone() for p in step.method.parameters()]
        assert step(noise(SMALLEST.config(method)), 1).applied
        after = step.method.parameters()
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert sum(moved) > len(moved) / 4  # projector's frozen bias and BYOL's targets may not


def test_phases_are_those_of_a_step_and_update_its_weights() -> None:
    step = train_step(SMALLEST.config("rdm_byol"))
    weight = next(step.method.backbone.parameters())
    before = weight.clone()
    found = phases(step, noise(SMALLEST.config("rdm_byol")), rounds=1)
    assert [*found] == ["forward", "loss", "backward", "update"]
    assert all(value > 0 for value in found.values())
    assert not torch.equal(weight, before)


# ---- turns -------------------------------------------------------------------------------------


def test_rivals_take_turns_and_each_is_first_once() -> None:
    calls: list[str] = []
    rivals = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    turns = in_turns(rivals, rounds=3)
    assert {name: len(times) for name, times in turns.items()} == dict.fromkeys("abc", 3)
    order = [calls[0]] + [b for a, b in pairwise(calls) if a != b]
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # the first three are the warm-up


def test_ratios_are_taken_within_rounds() -> None:
    """The machine is ten times slower in the second round; the rivals differ by two."""
    assert ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.1]) == pytest.approx(2.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0)
    assert spread([7.0]) == (7.0, 0.0)


# ---- peers -------------------------------------------------------------------------------------


def test_every_rival_has_the_same_optimizer_and_lightly_is_left_out_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert not isinstance(
        train_step(compare_peers.fair(SMALLEST.config("byol"), SMALLEST)).optimizer, Lars
    )
    monkeypatch.setitem(sys.modules, "lightly.models.modules", None)  # as if not installed
    path = tmp_path / "peers.json"
    monkeypatch.setattr(
        sys, "argv", ["x", "--case", SMALLEST.name, "--rounds", "1", "--rows", str(path)]
    )
    assert compare_peers.main() == 0
    captured = capsys.readouterr()
    assert captured.err.strip() == NO_LIGHTLY
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["lightly"] is None and result["machine"]["torch"] == torch.__version__
    assert result["n"] == 1 and not any("lightly" in name for name in result["steps"])
    assert "reference formulation / rdm-fast" in result["ratios"] and result["cudnn"] == "unused"
    table = "\n".join(peers([result]))
    assert "lightly is not installed there" in table and "| rdm_simsiam | " in table


def test_on_a_gpu_ratios_have_the_fastest_algorithms_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """lightly and the reference formulation always have them, so only our side changes."""
    monkeypatch.setattr(compare_peers, "CUDNN", ("deterministic", "fastest"))
    monkeypatch.setattr(compare_peers, "GPU", True)
    names = {*rivals_of(SMALLEST, lightly=True)}
    assert {"simsiam", "simsiam fastest", "lightly simsiam", REFERENCE} <= names
    assert not {"lightly simsiam fastest", f"{REFERENCE} fastest"} & names
    seconds = {
        "simsiam": 2.0, "simsiam fastest": 1.0, "lightly simsiam": 6.0,
        "rdm_simsiam": 3.0, "rdm_simsiam fastest": 2.0,
        "byol": 2.0, "lightly byol": 4.0,  # as if the fastest had not fitted into memory
    }  # fmt: skip
    found = ratios_of({name: [Turn(value, 0.0)] for name, value in seconds.items()})
    assert {title: values["wall"] for title, values in found.items()} == {
        "filter: RDM / plain SimSiam": 1.5, "filter: RDM / plain SimSiam fastest": 2.0,
        "lightly / rdm-fast, SimSiam": 3.0, "lightly / rdm-fast, SimSiam fastest": 6.0,
        "lightly / rdm-fast with filter": 2.0, "lightly / rdm-fast with filter fastest": 3.0,
        "lightly / rdm-fast, BYOL": 2.0,
    }  # fmt: skip


def test_ratios_name_rivals_that_exist() -> None:
    pytest.importorskip("lightly", reason="the extra peers is not installed")
    names = {*rivals_of(SMALLEST, lightly=True)}
    assert {name for pair in RATIOS.values() for name in pair} <= names


def test_lightlys_simsiam_with_our_weights_has_our_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightly", reason="the extra peers is not installed")
    check(SMALLEST, lightly=True)
    given = compare_peers.give_weights

    def without_the_predictor(method, model) -> None:  # type: ignore[no-untyped-def]
        fresh = [p.clone() for p in model.prediction_head.parameters()]
        given(method, model)
        for parameter, old in zip(model.prediction_head.parameters(), fresh, strict=True):
            parameter.data.copy_(old)

    monkeypatch.setattr(compare_peers, "give_weights", without_the_predictor)
    with pytest.raises(AssertionError):
        check(SMALLEST, lightly=True)


@pytest.mark.parametrize("method", ["dino", "swav"])
def test_dino_and_swav_of_lightly_take_a_step(method: str) -> None:
    """Their losses are compared in tests/methods/test_prototypes.py."""
    pytest.importorskip("lightly", reason="the extra peers is not installed")
    torch.manual_seed(0)
    model: Any = MODELS[method](SMALLEST.config(method, "fp32"))
    loss = model.loss(*torch.randn(2, 4, 3, 8, 8))
    loss.backward()
    assert 0 < loss.item() < 20 and all(p.grad is not None for p in model.backbone.parameters())
    model.update()
    if method == "swav":
        lengths = model.prototypes.heads[0].weight.norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_lightlys_byol_has_the_loss_of_its_documentation_and_moves_its_target() -> None:
    pytest.importorskip("lightly", reason="the extra peers is not installed")
    model = LightlyByol(SMALLEST.config("byol", "fp32")).eval()
    views = torch.randn(2, 4, 3, 8, 8)

    def cosine(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        p = model.prediction_head(model.projection_head(model.backbone(x).flatten(1)))
        z = model.projection_momentum(model.backbone_momentum(other).flatten(1))
        return torch.cosine_similarity(p, z).mean()

    expected = -(cosine(*views) + cosine(*views.flip(0))) / 2
    torch.testing.assert_close(model.loss(*views), expected)
    networks = [model.backbone, model.backbone_momentum]
    networks += [model.projection_head, model.projection_momentum]
    first = [next(network.parameters()) for network in networks]
    pairs = [first[:2], first[2:]]
    expected_targets = []
    with torch.no_grad():
        for online, target in pairs:
            assert online.requires_grad and not target.requires_grad
            online += 1
            expected_targets.append(0.996 * target + 0.004 * online)
    model.update()
    for (_, target), value in zip(pairs, expected_targets, strict=True):
        torch.testing.assert_close(target, value)


@pytest.mark.filterwarnings("ignore:filter.location")  # the mistake made here
def test_a_reference_with_another_filter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compare_peers.reference_config(SMALLEST)
    assert config.filter.engine == "reference" and config.precision == "fp32"
    other = replace(config, filter=replace(config.filter, sigma=1.0))
    monkeypatch.setattr(compare_peers, "reference_config", lambda _: other)
    with pytest.raises(AssertionError):
        check(SMALLEST, lightly=False)


def test_the_table_of_steps_shows_the_share_of_the_roof() -> None:
    row = {
        "case": "c", "name": "simsiam", "precision": "fp32", "cudnn": "unused",
        "median_s": 0.2, "iqr_s": 0.01, "rounds": 5, "images_per_s": 80.0,
        "percent_of_roof": 91.2, "cpu_percent_of_roof": 88.8, "peak_memory_gib": None,
        "phases_ms": {"forward": 60.0, "loss": 1.5},
    }  # fmt: skip
    text = "\n".join(step([row]))
    assert (
        "| c fp32 | simsiam | unused | 200 ms ± 10 ms | 5 | 80 | 91 % / 89 % | 60 | 1.5 |  |"
        in text
    )


def test_the_roofs_step_is_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the roof's speed per view a step of two views takes twice its time."""
    steps: list[object] = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: steps.append(self))
    supervised_step(SMALLEST)()
    assert len(steps) == 1
    assert percent([1.0, 3.0, 2.0], [2.0, 6.0, 8.0]) == pytest.approx(100.0)
