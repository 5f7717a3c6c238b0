"""Logistic regression to convergence: the strongest linear probe where images are few.

scikit-learn's solver on standardized embeddings, with the penalty chosen by cross-validation.
"""

import numpy as np
import torch
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


def fit_logistic(
    features: Tensor, labels: Tensor, *, classes: int, seed: int
) -> tuple[LinearClassifier, float]:
    """Multinomial logistic regression with an L2 penalty, by L-BFGS on the CPU.

    Args:
        features: embeddings, [N, d].
        labels: [N] int64 class ids; at least FOLDS images of every class that occurs.
        classes: number of classes K. A class that does not occur is never predicted.
        seed: of the folds.

    Returns:
        The classifier of raw embeddings, and the chosen C.

    Raises:
        ValueError: features and labels do not match, or a class has too few images.
    """
    check_labels(features, labels, classes, "training")
    fewest = int(torch.bincount(labels)[labels.unique()].min())
    if fewest < FOLDS:
        raise ValueError(
            f"a logistic probe needs {FOLDS} training images of every class and one has {fewest}: "
            "use --protocol closed-form"
        )
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": list(STRENGTHS)},
        cv=StratifiedKFold(FOLDS, shuffle=True, random_state=seed),
    )
    search.fit(features.double().cpu().numpy(), labels.cpu().numpy())
    scaler, model = (step for _, step in search.best_estimator_.steps)
    rows = model.coef_ / scaler.scale_
    offsets = model.intercept_ - rows @ scaler.mean_
    if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
        rows, offsets = np.concatenate([0 * rows, rows]), np.concatenate([0 * offsets, offsets])
    weight = np.zeros((classes, features.shape[1]))
    bias = np.full(classes, -np.inf)
    weight[model.classes_], bias[model.classes_] = rows, offsets
    classifier = LinearClassifier(torch.from_numpy(weight).float(), torch.from_numpy(bias).float())
    return classifier.to(features.device), float(model.C)
