"""rdm_fast.evaluation.logistic against scikit-learn's own predictions."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from rdm_fast.evaluation.logistic import STRENGTHS, fit_logistic
from tests.evaluation.embeddings import digits

(X, Y), (TEST, _) = digits()


def test_probabilities_are_scikit_learns_at_the_chosen_strength_for_any_run() -> None:
    """Both solve to L-BFGS's tolerance, from the same start."""
    rows, labels = X[:500], Y[:500]
    classifier, C = fit_logistic(rows, labels, classes=10, seed=3)
    assert C in STRENGTHS
    scaler = StandardScaler().fit(rows.double())
    model = LogisticRegression(C=C, max_iter=1000).fit(scaler.transform(rows), labels)
    expected = model.predict_proba(scaler.transform(TEST))
    found = classifier.logits(TEST).softmax(dim=1)
    np.testing.assert_allclose(found, expected, atol=5e-3)
    again, _ = fit_logistic(rows, labels, classes=10, seed=3)
    assert torch.equal(classifier.weight, again.weight)
    assert torch.equal(classifier.bias, again.bias)


def test_two_classes_and_an_absent_one_are_scored_like_the_rest() -> None:
    two = Y < 2
    features, labels = X[two], 2 * Y[two]  # classes 0 and 2 of three
    classifier, _ = fit_logistic(features, labels, classes=3, seed=0)
    logits = classifier.logits(features)
    assert (logits.argmax(dim=1) == labels).all()
    assert (logits[:, 1] == -torch.inf).all()


def test_a_class_with_too_few_images_is_an_error_that_names_another_protocol() -> None:
    labels = torch.tensor([0] * 20 + [1] * 4)
    with pytest.raises(ValueError) as error:
        fit_logistic(torch.randn(24, 3), labels, classes=2, seed=0)
    assert "--protocol closed-form" in str(error.value)
