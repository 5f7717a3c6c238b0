"""rdm_fast.evaluation.batched_sgd: one batched pass gives what separate fits give, and chooses."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rdm_fast.evaluation.batched_sgd import fit_best_sgd, fit_together
from rdm_fast.evaluation.probe import fit_iterated
from rdm_fast.evaluation.protocols import PROTOCOLS
from tests.evaluation.embeddings import Labeled, blobs

SWEEP = replace(PROTOCOLS["sgd-sweep"], epochs=4, batch=32)


def scaled_blobs(n: int = 150) -> Labeled:
    features, labels = blobs(n)
    return features * torch.arange(1.0, 6.0), labels


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("schedule", ["cosine", "steps"])
def test_each_setting_is_as_a_fit_by_itself(schedule: str, standardize: bool) -> None:
    features, labels = scaled_blobs()
    protocol = replace(
        SWEEP,
        schedule=schedule,  # type: ignore[arg-type]
        milestones=(0.5,) if schedule == "steps" else (),
        standardize=standardize,
    )
    settings = [(0.1, 0.0), (0.01, 0.1), (0.3, 1e-3)]
    found = fit_together(features, labels, settings, classes=3, protocol=protocol, seed=5)
    for (lr, decay), classifier in zip(settings, found, strict=True):
        alone = replace(protocol, solver="sgd", lr=lr, weight_decay=decay)
        expected = fit_iterated(features, labels, classes=3, protocol=alone, seed=5)
        # 16 steps in float32, whose products associate differently
        torch.testing.assert_close(classifier.weight, expected.weight, atol=2e-5, rtol=0)
        torch.testing.assert_close(classifier.bias, expected.bias, atol=2e-5, rtol=0)


def test_a_diverging_setting_spoils_no_other_and_is_not_chosen() -> None:
    features, labels = scaled_blobs()
    settings = [(0.1, 0.0), (1e39, 0.0)]
    calm, wild = fit_together(features, labels, settings, classes=3, protocol=SWEEP, seed=5)
    (alone,) = fit_together(features, labels, settings[:1], classes=3, protocol=SWEEP, seed=5)
    torch.testing.assert_close(calm.weight, alone.weight, atol=1e-6, rtol=0)
    assert not wild.weight.isfinite().all()
    for rates in ((1e39, 0.1), (0.1, 1e39)):
        protocol = replace(SWEEP, lrs=rates, weight_decays=(0.0,))
        _, best = fit_best_sgd(features, labels, classes=3, protocol=protocol, seed=0)
        assert best == (0.1, 0.0)


def test_the_best_setting_on_held_out_training_images_is_fitted_to_all_of_them() -> None:
    features, labels = scaled_blobs(600)
    protocol = replace(SWEEP, lrs=(1e-7, 0.1), weight_decays=(0.0, 50.0))
    classifier, (lr, decay) = fit_best_sgd(features, labels, classes=3, protocol=protocol, seed=2)
    assert (lr, decay) == (0.1, 0.0)  # the others do not learn, or forget at once
    chosen = replace(protocol, solver="sgd", lr=lr, weight_decay=decay)
    expected = fit_iterated(features, labels, classes=3, protocol=chosen, seed=2)
    assert torch.equal(classifier.weight, expected.weight)


def test_candidates_never_see_the_images_that_choose_among_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, labels = scaled_blobs(95)
    features[:, 0] = torch.arange(95.0)  # names the image
    seen: list[Tensor] = []

    def spy(rows: Tensor, *args: object, **options: object) -> object:
        seen.append(rows[:, 0])
        return fit_together(rows, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("rdm_fast.evaluation.batched_sgd.fit_together", spy)
    fit_best_sgd(features, labels, classes=3, protocol=replace(SWEEP, epochs=1), seed=0)
    (kept,) = seen
    assert len(kept) == len(kept.unique()) == 95 - 9


def test_of_equally_good_settings_the_most_decayed_and_slowest_is_chosen() -> None:
    labels = torch.arange(100) % 2
    features = torch.stack([labels * 2.0 - 1, torch.zeros(100)], dim=1)  # any of them separates
    protocol = replace(SWEEP, lrs=(0.3, 0.1), weight_decays=(0.0, 1e-3))
    assert fit_best_sgd(features, labels, classes=2, protocol=protocol, seed=0)[1] == (0.1, 1e-3)


def test_a_sweep_depends_on_its_seed_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (
        fit_together(*scaled_blobs(), [(0.1, 0.0)], classes=3, protocol=SWEEP, seed=seed)[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)


def test_a_sweep_of_one_image_is_an_error() -> None:
    with pytest.raises(ValueError):
        fit_best_sgd(torch.ones(1, 2), torch.zeros(1).long(), classes=1, protocol=SWEEP, seed=0)
