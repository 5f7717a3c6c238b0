"""From embeddings of a training and a test set to the accuracies that are reported."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rdm_fast.errors import NonFinite
from rdm_fast.evaluation.accuracy import TOP, check_labels, rank_classes, topk_accuracy
from rdm_fast.evaluation.batched_sgd import fit_best_sgd
from rdm_fast.evaluation.features import Labeled
from rdm_fast.evaluation.knn import knn_accuracy
from rdm_fast.evaluation.logistic import fit_logistic
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
    knn_top1: float
    knn_top5: float
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
) -> Result:
    """Accuracy on the test set of a linear classifier fitted to the training set, and of kNN.

    Args:
        train: embeddings [N, d] float32 and labels [N] int64; everything runs on their device.
        test: embeddings [M, d] float32 and labels [M] int64, on the same device.
        protocol: one of `protocols.PROTOCOLS`, or any other.
        classes: number of classes K, the largest label of both sets + 1.
        seed: of initial weights, order of images and held-out images.
        classifier: one trained on views, measured in place of a fit to `train`.

    Raises:
        ValueError: features and labels do not match, or there are fewer training images than
            voting neighbors.
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

    on_views = classifier is not None
    penalty, lr = None, protocol.lr or None
    if classifier is None:
        classifier, penalty, lr = _fit(*train, protocol, classes, seed)
    ranking = rank_classes(classifier.logits(test[0]))
    k, temperature = protocol.knn_k, protocol.knn_temperature
    knn = knn_accuracy(*train, *test, classes=classes, k=k, temperature=temperature)
    return Result(
        protocol=protocol.name,
        top1=topk_accuracy(ranking, test[1], 1),
        top5=topk_accuracy(ranking, test[1], TOP),
        knn_top1=knn[0],
        knn_top5=knn[1],
        train_images=len(train[1]),
        test_images=len(test[1]),
        classes=classes,
        epochs=protocol.epochs,
        batch=protocol.batch_for(len(train[1])),
        penalty=penalty,
        lr=lr,
        trained_on="views" if on_views else "features",
        seed=seed,
    )


def _fit(
    features: Tensor, labels: Tensor, protocol: Protocol, classes: int, seed: int
) -> tuple[LinearClassifier, float | None, float | None]:
    """The classifier, and its penalty and learning rate, if any."""
    match protocol.solver:
        case "logistic":
            classifier, strength = fit_logistic(features, labels, classes=classes, seed=seed)
            return classifier, strength, None
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
