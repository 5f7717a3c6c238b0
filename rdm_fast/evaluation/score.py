"""From embeddings of a training and a test set to the accuracies that are reported."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from rdm_fast.errors import DataError, NonFinite
from rdm_fast.evaluation.accuracy import TOP, check_labels, rank_classes, topk_accuracy
from rdm_fast.evaluation.batched_sgd import fit_best_sgd
from rdm_fast.evaluation.features import Labeled
from rdm_fast.evaluation.knn import knn_accuracy
from rdm_fast.evaluation.logistic import FOLDS, UNTUNED, fit_logistic
from rdm_fast.evaluation.probe import (
    LinearClassifier,
    choose_ridge,
    fit_closed_form,
    fit_iterated,
)
from rdm_fast.evaluation.protocols import FINETUNE, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Accuracies in percent, and how they were measured."""

    protocol: str
    top1: float
    """Linear probe, after the last epoch."""
    top5: float
    """With fewer than 5 classes, over all of them."""
    knn_top1: float | None
    """None while kNN has not run."""
    knn_top5: float | None
    knn_k: int
    """Neighbors that vote: the protocol's, or all training images if there are fewer."""
    train_images: int
    test_images: int
    classes: int
    epochs: int
    """Passes over the training embeddings; 0 for closed form and logistic."""
    batch: int
    """Images in one update: the protocol's batch, or all images if there are fewer."""
    penalty: float | None
    """Chosen on training images: lambda of the closed form, C of the logistic probe, weight decay
    of the sweep."""
    lr: float | None
    """Learning rate of the first epoch, for the sweep the chosen one; None without epochs."""
    trained_on: Literal["features", "views"]
    """Cached embeddings, or a random view of each image in each epoch."""
    seed: int
    lowered: list[str] = field(default_factory=list)
    """What the protocol asks for and too few images cannot give."""
    layer_decay: float = 1.0
    """Factor of the learning rate from one layer to the one below, of fine-tuning."""

    @property
    def label(self) -> str:
        """Name in the file of this result."""
        augmented = self.trained_on == "views" and self.protocol != FINETUNE.name
        return f"{self.protocol}-augmented" if augmented else self.protocol

    @property
    def chosen(self) -> str:
        """The setting chosen on training images, for people; empty without a choice."""
        if self.penalty is None:
            return ""
        name = {"closed-form": "lambda", "logistic": "C"}.get(self.protocol, "weight decay")
        rate = f"lr {self.lr:g}, " if self.lr is not None else ""
        return f"   ({rate}{name} {self.penalty:.3g})"


def score(
    train: Labeled,
    test: Labeled,
    protocol: Protocol,
    *,
    classes: int,
    seed: int,
    classifier: LinearClassifier | None = None,
    keep: Callable[[Result], object] = lambda _: None,
) -> Result:
    """Accuracy on the test set of a linear classifier fitted to the training set, and of kNN.

    With too few training images for a setting of the protocol, the setting is lowered and the
    result says so.

    Args:
        train: embeddings [N, d] float32 and labels [N] int64; everything runs on their device.
        test: embeddings [M, d] float32 and labels [M] int64, on the same device.
        protocol: one of `protocols.PROTOCOLS`, or any other.
        classes: number of classes K, the largest label of both sets + 1.
        seed: of initial weights, order of images and held-out images.
        classifier: one trained on views, measured in place of a fit to `train`.
        keep: is given the result before kNN starts, which may fail.

    Raises:
        ValueError: features and labels do not match.
        DataError: the training images are of one class.
        NonFinite: an embedding is NaN or infinite.
    """
    for (features, labels), name in ((train, "training"), (test, "test")):
        check_labels(features, labels, classes, name)
        low, high = features.aminmax(dim=1)  # both propagate NaN, without a second [N, d]
        bad = len(features) - int((low.isfinite() & high.isfinite()).sum())
        if bad:
            raise NonFinite(
                f"{bad} of {len(features)} {name} images have an embedding that is not finite: "
                "evaluate with --precision fp32, or an earlier checkpoint"
            )
    widths = train[0].shape[1], test[0].shape[1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"training features have {widths[0]} dimensions and test features {widths[1]}: both "
            "must come from one backbone"
        )

    require_two_classes(train[1])

    on_views = classifier is not None
    penalty, lr, lowered = None, protocol.lr or None, list[str]()
    if classifier is None:
        classifier, penalty, lr = _fit(*train, protocol, classes, seed, lowered)
    ranking = rank_classes(classifier.logits(test[0]))
    k = min(protocol.knn_k, len(train[1]))
    if k < protocol.knn_k:
        lowered.append(f"all {k} training images vote in kNN, not {protocol.knn_k} neighbors")
    result = Result(
        protocol=protocol.name,
        top1=topk_accuracy(ranking, test[1], 1),
        top5=topk_accuracy(ranking, test[1], TOP),
        knn_top1=None,
        knn_top5=None,
        knn_k=k,
        train_images=len(train[1]),
        test_images=len(test[1]),
        classes=classes,
        epochs=protocol.epochs,
        batch=protocol.batch_for(len(train[1])),
        penalty=penalty,
        lr=lr,
        trained_on="views" if on_views else "features",
        seed=seed,
        lowered=lowered,
        layer_decay=protocol.layer_decay,
    )
    keep(result)
    top1, top5 = knn_accuracy(
        *train, *test, classes=classes, k=k, temperature=protocol.knn_temperature
    )
    return replace(result, knn_top1=top1, knn_top5=top5)


def require_two_classes(labels: Tensor) -> None:
    """Refuse training labels [N] of one class, of which any classifier is right.

    Raises:
        DataError: there are fewer than two classes.
    """
    if len(found := labels.unique()) < 2:
        raise DataError(
            f"the training images that have a label are all of class {int(found[0])}: an accuracy "
            "needs two classes or more"
        )


def _fit(
    features: Tensor,
    labels: Tensor,
    protocol: Protocol,
    classes: int,
    seed: int,
    lowered: list[str],
) -> tuple[LinearClassifier, float | None, float | None]:
    """The classifier, and its penalty and learning rate, if any; adds to `lowered`."""
    match protocol.solver:
        case "logistic":
            found = fit_logistic(features, labels, classes=classes, seed=seed)
            if not found.folds:
                lowered.append(f"C is {UNTUNED:g}: no two classes have 2 training images")
            elif found.folds < FOLDS:
                few = "a class has no more training images"
                lowered.append(f"{found.folds} folds choose C, not {FOLDS}: {few}")
            return found.classifier, found.strength, None
        case "closed-form":
            scaled = protocol.standardize
            ridge = choose_ridge(features, labels, classes=classes, seed=seed, standardize=scaled)
            classifier = fit_closed_form(
                features, labels, classes=classes, ridge=ridge, standardize=scaled
            )
            return classifier, ridge, None
        case "sgd-sweep":
            classifier, (lr, decay) = fit_best_sgd(
                features, labels, classes=classes, protocol=protocol, seed=seed
            )
            return classifier, decay, lr
        case "sgd" | "lars":
            classifier = fit_iterated(
                features, labels, classes=classes, protocol=protocol, seed=seed
            )
            return classifier, None, protocol.lr
