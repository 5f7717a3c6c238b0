"""rdm_fast.evaluation.probe against scikit-learn's solvers and the LARC rule in a plain loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from bench.measured import measure_solvers
from rdm_fast.evaluation.accuracy import rank_classes, topk_accuracy
from rdm_fast.evaluation.probe import (
    LinearClassifier,
    choose_on_held_out,
    choose_ridge,
    fit_closed_form,
    fit_iterated,
)
from rdm_fast.evaluation.protocols import PROTOCOLS, Protocol
from tests.evaluation.embeddings import blobs, digits

SGD = PROTOCOLS["reference-cifar"]
LARS = replace(PROTOCOLS["reference-imagenet"], batch=64)  # its 4096 is for a million images


def fit(features: Tensor, labels: Tensor, protocol: Protocol, seed: int = 0) -> LinearClassifier:
    classes = int(labels.max()) + 1
    return fit_iterated(features, labels, classes=classes, protocol=protocol, seed=seed)


def closed_form(features: Tensor, labels: Tensor, *, seed: int = 0) -> LinearClassifier:
    ridge = choose_ridge(features, labels, classes=10, seed=seed)
    return fit_closed_form(features, labels, classes=10, ridge=ridge)


def accuracy(classifier: LinearClassifier, features: Tensor, labels: Tensor) -> float:
    return topk_accuracy(rank_classes(classifier.logits(features)), labels, 1)


# ---- closed form -------------------------------------------------------------------------------


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("ridge", [1e-2, 300.0])
@pytest.mark.parametrize("n", [40, 1400], ids=["N < d", "N > d"])
def test_closed_form_equals_scikit_learns_ridge(n: int, ridge: float, standardize: bool) -> None:
    features, labels = digits()[0]
    features, labels = features[:n] + 3, labels[:n]  # off center, so that the intercept counts
    found = fit_closed_form(features, labels, classes=10, ridge=ridge, standardize=standardize)
    model = Ridge(alpha=ridge)
    model = make_pipeline(StandardScaler(), model) if standardize else model
    X = features.double().numpy()
    expected = model.fit(X, F.one_hot(labels, 10).double().numpy()).predict(X)
    logits = X @ found.weight.double().numpy().T + found.bias.double().numpy()
    # Weight and bias are rounded to float32, 6e-8 relative; pixels are below 4.
    largest = float(4 * found.weight.abs().sum(dim=1).max() + found.bias.abs().max())
    np.testing.assert_allclose(logits, expected, atol=1e-7 * largest)
    if not standardize:
        np.testing.assert_allclose(found.weight.numpy(), model.coef_, atol=1e-6)
        np.testing.assert_allclose(found.bias.numpy(), model.intercept_, atol=1e-6)


def test_predictions_are_those_of_scikit_learns_ridge_classifier() -> None:
    train, (test, _) = digits()
    found = fit_closed_form(*train, classes=10, ridge=1.0)
    model = RidgeClassifier(alpha=1.0).fit(*train)
    assert rank_classes(found.logits(test), 1)[:, 0].tolist() == model.predict(test).tolist()


def test_closed_form_sums_moments_over_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = digits()
    whole = fit_closed_form(*train, classes=10, ridge=1.0)
    monkeypatch.setattr("rdm_fast.evaluation.probe.ROWS", 100)
    parts = fit_closed_form(*train, classes=10, ridge=1.0)
    torch.testing.assert_close(parts.weight, whole.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts.bias, whole.bias, atol=1e-6, rtol=0)


def test_chosen_lambda_is_the_best_on_the_held_out_tenth() -> None:
    features, labels = (part[:300] for part in digits()[0])
    grid = (1e-6, 1e-2, 1.0, 100.0, 1e4)
    found = choose_ridge(features, labels, classes=10, seed=3, grid=grid)

    order = torch.randperm(300, generator=torch.Generator().manual_seed(3)).numpy()
    X, y = features.double().numpy(), labels.numpy()

    def mean_eigenvalue(rows: np.ndarray) -> float:
        return float(((rows - rows.mean(0)) ** 2).sum() / rows.shape[1])

    held_out, kept = order[:30], order[30:]
    scores = [
        RidgeClassifier(alpha=multiple * mean_eigenvalue(X[kept]))
        .fit(X[kept], y[kept])
        .score(X[held_out], y[held_out])
        for multiple in grid
    ]
    best = max(m for m, score in zip(grid, scores, strict=True) if score == max(scores))
    assert min(scores) < max(scores)
    assert found == pytest.approx(best * mean_eigenvalue(X), rel=1e-6)


def test_of_equally_good_lambdas_the_largest_wins() -> None:
    features, labels = torch.eye(2).repeat(50, 1), torch.arange(2).repeat(50)
    found = choose_ridge(features, labels, classes=2, seed=0, grid=(1e-3, 1e-1, 1e-2))
    assert found == pytest.approx(1e-1 * 25)  # both eigenvalues are on average 100 * 1/4


def test_lambda_scales_with_the_embeddings() -> None:
    features, labels = digits()[0]
    ridge = choose_ridge(features, labels, classes=10, seed=0)
    scaled = choose_ridge(8 * features, labels, classes=10, seed=0)
    assert scaled == pytest.approx(64 * ridge, rel=1e-6)


@pytest.mark.parametrize("standardize", [False, True])
def test_collapsed_embeddings_predict_the_most_frequent_class(standardize: bool) -> None:
    features, labels = torch.full((50, 4), 0.1), torch.tensor([0] * 20 + [1] * 30)
    ridge = choose_ridge(features, labels, classes=2, seed=0, standardize=standardize)
    found = fit_closed_form(features, labels, classes=2, ridge=ridge, standardize=standardize)
    assert accuracy(found, features, labels) == 60


def test_a_classifier_that_is_not_finite_is_never_chosen() -> None:
    """NaN logits rank class 0 first, which is right for all of these images."""
    features, labels = torch.ones(20, 1), torch.zeros(20, dtype=torch.int64)
    candidates = {
        "wild": LinearClassifier(torch.full((2, 1), torch.nan), torch.zeros(2)),
        "wrong": LinearClassifier(torch.tensor([[0.0], [1.0]]), torch.zeros(2)),
    }
    assert choose_on_held_out(features, labels, 0, lambda _: candidates.items()) == "wrong"


# ---- by gradient descent -----------------------------------------------------------------------


def test_sgd_reaches_the_optimum_that_scikit_learn_finds() -> None:
    features, labels = blobs()
    decay = 0.05
    protocol = replace(SGD, epochs=600, batch=len(features), lr=0.5, weight_decay=decay)
    found = fit(features, labels, protocol)
    # Weight decay includes the bias: for scikit-learn it is the weight of a constant feature.
    X = F.pad(features, (0, 1), value=1.0).double().numpy()
    model = LogisticRegression(
        C=1 / (decay * len(X)), fit_intercept=False, tol=1e-10, max_iter=10_000
    ).fit(X, labels.numpy())
    parameters = torch.cat([found.weight, found.bias[:, None]], dim=1)
    # The loss is decay-strongly convex and float32 gradients stop at about 1e-7: 1e-7 / decay.
    np.testing.assert_allclose(parameters.numpy(), model.coef_, atol=1e-5)


def test_lars_follows_larc_with_clip_false() -> None:
    features, labels = blobs()
    n, epochs, decay = len(features), 6, 0.01
    protocol = replace(LARS, epochs=epochs, batch=n, lr=100.0, weight_decay=decay)
    found = fit(features, labels, protocol)

    start = fit(features, labels, replace(protocol, lr=1e-30, epochs=1)).weight.double().numpy()
    parameters = [start.copy(), np.zeros(3)]
    buffers = [np.zeros_like(p) for p in parameters]
    X, Y = features.double().numpy(), np.eye(3)[labels.numpy()]
    for epoch in range(epochs):
        lr = 100.0 * (1 + np.cos(np.pi * epoch / epochs)) / 2
        scores = np.exp(X @ parameters[0].T + parameters[1])
        residual = (scores / scores.sum(1, keepdims=True) - Y) / n
        for p, gradient, buffer in zip(
            parameters, (residual.T @ X, residual.sum(0)), buffers, strict=True
        ):
            p_norm, g_norm = np.linalg.norm(p), np.linalg.norm(gradient)
            if p_norm and g_norm:  # apex leaves the gradient of a zero bias as it is
                trust = 0.001 * p_norm / (g_norm + decay * p_norm + 1e-8)
                gradient = trust * (gradient + decay * p)
            buffer *= 0.9
            buffer += gradient
            p -= lr * buffer
    assert np.abs(parameters[0] - start).max() > 0.1 * np.abs(start).max()
    # Six steps in float32, whose gradients of order 1 round by 1e-7 relative to the largest
    scale = max(np.abs(p).max() for p in parameters)
    np.testing.assert_allclose(found.weight.numpy(), parameters[0], atol=1e-5 * scale)
    np.testing.assert_allclose(found.bias.numpy(), parameters[1], atol=1e-5 * scale)


def test_normal_start_is_small_with_zero_bias_and_default_is_uniform() -> None:
    features, labels = torch.zeros(20, 400), torch.arange(20) % 10
    still = replace(SGD, lr=1e-30, epochs=1)
    normal, default = (
        fit(features, labels, replace(still, init="normal")),
        fit(features, labels, still),
    )
    assert normal.bias.abs().max() < 1e-20
    # The deviation of 4000 draws is known to 1 / sqrt(8000) of itself: five of these are allowed.
    assert float(normal.weight.std()) == pytest.approx(0.01, rel=5 / 8000**0.5)
    assert float(default.weight.std()) == pytest.approx((1 / 20) / 3**0.5, rel=5 / 8000**0.5)
    assert max(default.weight.abs().max(), default.bias.abs().max()) <= 1 / 20
    assert default.bias.abs().max() > 0


@pytest.mark.parametrize("solver", ["sgd", "lars"])
def test_a_fit_depends_on_its_seed_alone(solver: str) -> None:
    protocol = replace(SGD, epochs=3, batch=32, solver=solver)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    first, again, other = (fit(*blobs(), protocol, seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)


def test_one_batch_of_all_images_does_not_depend_on_their_order() -> None:
    features, labels = blobs()
    protocol = replace(SGD, epochs=20, batch=10_000)  # more than there are
    turned = fit(features.flip(0), labels.flip(0), protocol)
    found = fit(features, labels, protocol)
    torch.testing.assert_close(found.weight, turned.weight, atol=1e-5, rtol=0)


def test_images_that_fill_no_batch_are_dropped() -> None:
    features, labels = torch.ones(10, 1), torch.zeros(10, dtype=torch.int64)
    features[0] = float("nan")  # one bad image poisons the weights as soon as it is used
    protocol = replace(SGD, epochs=1, batch=6)
    poisoned = {bool(fit(features, labels, protocol, s).weight.isnan().any()) for s in range(20)}
    assert poisoned == {True, False}  # used in 6 of 10 orders, dropped in 4


def test_the_last_batch_of_simsiams_protocol_is_a_whole_step() -> None:
    """Of equal images, a batch of 4 moves the weights as far as one of 6."""

    def weight(n: int, drop_last: bool) -> torch.Tensor:
        features, labels = torch.ones(n, 2), torch.zeros(n, dtype=torch.int64)
        protocol = replace(LARS, batch=6, epochs=1, drop_last=drop_last)
        return fit_iterated(features, labels, classes=2, protocol=protocol, seed=0).weight

    assert not LARS.drop_last
    torch.testing.assert_close(weight(10, False), weight(12, False), atol=1e-7, rtol=0)
    torch.testing.assert_close(weight(10, True), weight(6, True), atol=1e-7, rtol=0)
    assert (weight(10, False) - weight(10, True)).abs().max() > 1e-5


def test_standardized_sgd_does_not_depend_on_scale_and_offset_of_a_dimension() -> None:
    features, labels = blobs()
    features = torch.cat([features, torch.full((len(features), 1), 0.7)], dim=1)  # and a constant
    protocol = replace(SGD, epochs=10, standardize=True)
    moved = features * torch.tensor([1.0, 4.0, 0.5, 16.0, 1.0, 1.0]) + 2
    found = fit(features, labels, protocol).logits(features)
    same = fit(moved, labels, protocol).logits(moved)
    torch.testing.assert_close(found, same, atol=1e-4, rtol=0)  # an offset of 2 costs a digit


# ---- together ----------------------------------------------------------------------------------


def test_on_raw_digits_sgd_and_lars_are_as_good_as_scikit_learns_logistic_regression() -> None:
    train, test = digits()
    expected = 100 * LogisticRegression(C=10, max_iter=2000).fit(*train).score(*test)
    found = [accuracy(fit(*train, protocol), *test) for protocol in (SGD, LARS)]
    assert min(found) >= 94 and max(abs(top1 - expected) for top1 in found) <= 1.5, found


@pytest.mark.slow  # 16 fits
def test_the_three_solvers_agree_within_half_a_point() -> None:
    """Cross-entropy and squared error, each with some decay, by four folds over all digits."""
    values = measure_solvers(None, quick=False)
    found = [top1 for row in values.values() for [top1] in row.values()][:3]
    assert min(found) > 97.5 and max(found) - min(found) <= 0.5, found


def test_labels_that_do_not_match_and_impossible_lambdas_are_errors() -> None:
    features, labels = blobs()
    for solver in ("sgd", "lars"):
        protocol = replace(SGD, solver=solver)  # type: ignore[arg-type]
        with pytest.raises(ValueError):
            fit(features, labels[1:], protocol)
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError):
            fit_closed_form(features, labels, classes=3, ridge=ridge)
    with pytest.raises(ValueError):
        choose_ridge(features[:1], labels[:1], classes=3, seed=0)
