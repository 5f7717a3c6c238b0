"""rdm_fast.evaluation.logistic against scikit-learn's own predictions."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from rdm_fast.evaluation.logistic import FOLDS, STRENGTHS, UNTUNED, fit_logistic
from tests.evaluation.embeddings import digits

(X, Y), (TEST, _) = digits()


def test_probabilities_are_scikit_learns_at_the_chosen_strength_for_any_run() -> None:
    """Both solve to L-BFGS's tolerance, from the same start."""
    rows, labels = X[:500], Y[:500]
    classifier, C, folds = fit_logistic(rows, labels, classes=10, seed=3)
    assert C in STRENGTHS and folds == FOLDS
    scaler = StandardScaler().fit(rows.double())
    model = LogisticRegression(C=C, max_iter=1000).fit(scaler.transform(rows), labels)
    expected = model.predict_proba(scaler.transform(TEST))
    found = classifier.logits(TEST).softmax(dim=1)
    np.testing.assert_allclose(found, expected, atol=5e-3)
    again, *_ = fit_logistic(rows, labels, classes=10, seed=3)
    assert torch.equal(classifier.weight, again.weight)
    assert torch.equal(classifier.bias, again.bias)


def test_two_classes_and_an_absent_one_are_scored_like_the_rest() -> None:
    two = Y < 2
    features, labels = X[two], 2 * Y[two]  # classes 0 and 2 of three
    classifier, *_ = fit_logistic(features, labels, classes=3, seed=0)
    logits = classifier.logits(features)
    assert (logits.argmax(dim=1) == labels).all()
    assert (logits[:, 1] == -torch.inf).all()


@pytest.mark.parametrize(
    ("counts", "folds"),
    [([20, 4], 4), ([20, 2, 1], 2), ([9, 6, 1], 5), ([20, 1], 0), ([1, 1, 1], 0)],
)
def test_the_rarest_class_of_several_images_decides_the_folds(
    counts: list[int], folds: int, recwarn: pytest.WarningsRecorder
) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    features = torch.eye(3)[labels] + 0.1 * torch.randn(len(labels), 3)
    found = fit_logistic(features, labels, classes=3, seed=0)
    assert found.folds == folds and (folds or found.strength == UNTUNED)
    assert found.classifier.logits(features)[:, : len(counts)].isfinite().all()
    assert not recwarn.list
