"""Logistic regression to convergence: the strongest linear probe where images are few.

scikit-learn's solver on standardized embeddings, with the penalty chosen by cross-validation.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from rdm_fast.evaluation.accuracy import check_labels
from rdm_fast.evaluation.probe import LinearClassifier

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Candidates for C, the inverse of the penalty on the weights of standardized embeddings."""
FOLDS = 5
UNTUNED = 1.0
"""C where there are too few images to choose it."""


class Logistic(NamedTuple):
    """A fit, and how its penalty was chosen."""

    classifier: LinearClassifier
    strength: float
    """C."""
    folds: int
    """Of the cross-validation that chose C; 0 if there was none."""


def fit_logistic(features: Tensor, labels: Tensor, *, classes: int, seed: int) -> Logistic:
    """Multinomial logistic regression with an L2 penalty, by L-BFGS on the CPU.

    C is chosen by FOLDS folds, or by as many as the rarest class has images. Classes of one image
    take no part in the choice; if fewer than two others remain, C is UNTUNED.

    Args:
        features: embeddings, [N, d].
        labels: [N] int64 class ids, of at least two classes.
        classes: number of classes K. A class that does not occur is never predicted.
        seed: of the folds.

    Raises:
        ValueError: features and labels do not match.
    """
    check_labels(features, labels, classes, "training")
    X, Y = features.double().cpu().numpy(), labels.cpu().numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = _folds(Y)
    strength = UNTUNED
    if folds:
        search = GridSearchCV(
            probe,
            {"logisticregression__C": list(STRENGTHS)},
            cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
            refit=False,
        )
        shared = np.bincount(Y)[Y] > 1
        search.fit(X[shared], Y[shared])
        strength = search.best_params_["logisticregression__C"]
    probe.set_params(logisticregression__C=strength).fit(X, Y)
    scaler, model = (step for _, step in probe.steps)
    rows = model.coef_ / scaler.scale_
    offsets = model.intercept_ - rows @ scaler.mean_
    if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
        rows, offsets = np.concatenate([0 * rows, rows]), np.concatenate([0 * offsets, offsets])
    weight = np.zeros((classes, features.shape[1]))
    bias = np.full(classes, -np.inf)
    weight[model.classes_], bias[model.classes_] = rows, offsets
    classifier = LinearClassifier(torch.from_numpy(weight).float(), torch.from_numpy(bias).float())
    return Logistic(classifier.to(features.device), float(strength), folds)


def _folds(labels: NDArray[np.int64]) -> int:
    counts = np.bincount(labels)
    shared = counts[counts > 1]
    return min(FOLDS, int(shared.min())) if len(shared) > 1 else 0
