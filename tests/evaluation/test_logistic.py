"""rdm_fast.evaluation.logistic against scikit-learn's own predictions."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from rdm_fast.evaluation.logistic import STRENGTHS, fit_logistic

DIGITS = load_digits()
X, Y = torch.from_numpy(DIGITS.data).float(), torch.from_numpy(DIGITS.target)
TRAIN, TEST = slice(0, 1400), slice(1400, None)


def test_probabilities_are_those_of_scikit_learn_at_the_chosen_strength() -> None:
    """Both solve to L-BFGS's tolerance, from the same start."""
    classifier, C = fit_logistic(X[TRAIN], Y[TRAIN], classes=10, seed=0)
    assert C in STRENGTHS
    scaler = StandardScaler().fit(X[TRAIN].double())
    model = LogisticRegression(C=C, max_iter=1000).fit(scaler.transform(X[TRAIN]), Y[TRAIN])
    expected = model.predict_proba(scaler.transform(X[TEST]))
    ours = classifier.logits(X[TEST]).softmax(dim=1)
    np.testing.assert_allclose(ours, expected, atol=5e-3)


def test_two_classes_and_an_absent_one_are_scored_like_the_rest() -> None:
    two = Y < 2
    features, labels = X[two], 2 * Y[two]  # classes 0 and 2 of three
    classifier, _ = fit_logistic(features, labels, classes=3, seed=0)
    logits = classifier.logits(features)
    assert (logits.argmax(dim=1) == labels).all()
    assert (logits[:, 1] == -torch.inf).all()


def test_the_same_seed_gives_the_same_classifier() -> None:
    one, _ = fit_logistic(X[TRAIN], Y[TRAIN], classes=10, seed=3)
    other, _ = fit_logistic(X[TRAIN], Y[TRAIN], classes=10, seed=3)
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_a_class_of_too_few_images_is_told_the_way_out() -> None:
    labels = torch.tensor([0] * 20 + [1] * 4)
    with pytest.raises(ValueError, match=r"one has 4: use --protocol closed-form"):
        fit_logistic(torch.randn(24, 3), labels, classes=2, seed=0)
