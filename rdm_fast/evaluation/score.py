"""From embeddings of a training and a test set to the numbers that are reported."""

from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor

from rdm_fast.errors import NonFinite
from rdm_fast.evaluation.accuracy import TOP, check_labels, rank_classes, topk_accuracy
from rdm_fast.evaluation.batched_sgd import fit_sweep
from rdm_fast.evaluation.knn import knn_accuracy
from rdm_fast.evaluation.logistic import fit_logistic
from rdm_fast.evaluation.probe import (
    LinearClassifier,
    choose_ridge,
    fit_closed_form,
    fit_lars,
    fit_sgd,
)
from rdm_fast.evaluation.protocols import FINETUNE, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Accuracies in percent, and what they were measured with."""

    protocol: str
    top1: float
    """Linear probe; after the last epoch, not the best one on the test set."""
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
    """Images of one update: the protocol's batch, or all images where there are fewer."""
    penalty: float | None
    """What was chosen on training images: lambda of the closed form, C of the logistic probe, the
    sweep's weight decay."""
    lr: float | None
    """Learning rate of the first epoch, for the sweep the chosen one; None without epochs."""
    trained_on: Literal["features", "views"]
    """Cached embeddings, or views drawn anew in every epoch."""
    seed: int

    def as_dict(self) -> dict[str, str | int | float | None]:
        """Plain values, for JSON."""
        return asdict(self)

    @property
    def label(self) -> str:
        """Names the file of this result among those of one checkpoint."""
        augmented = self.trained_on == "views" and self.protocol != FINETUNE.name
        return f"{self.protocol}-augmented" if augmented else self.protocol

    @property
    def chosen_in_words(self) -> str:
        """What was chosen on training images; empty where there was no choice."""
        if self.penalty is None:
            return ""
        name = {"closed-form": "lambda", "logistic": "C"}.get(self.protocol, "weight decay")
        rate = f"lr {self.lr:g}, " if self.lr is not None else ""
        return f"   ({rate}{name} {self.penalty:.3g})"


def evaluate(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    protocol: Protocol,
    *,
    classes: int,
    seed: int,
    classifier: LinearClassifier | None = None,
    trained_on: Literal["features", "views"] = "features",
) -> Result:
    """Fit a linear classifier on the training embeddings and measure it, and kNN, on the test set.

    Args:
        train_features: [N, d] float32; all of the work runs on its device.
        train_labels: [N] int64.
        test_features: [M, d] float32, on the same device.
        test_labels: [M] int64.
        protocol: one of `protocols.PROTOCOLS`, or one's own.
        classes: number of classes K, the largest label of both sets + 1.
        seed: of initial weights, order of images and held-out images; the result is a function
            of the arguments.
        classifier: measured instead of one that is fitted here.
        trained_on: what it was trained on, for the result.

    Raises:
        ValueError: features and labels do not fit together, or there are fewer training images
            than voting neighbors.
        NonFinite: an embedding is NaN or infinite.
    """
    check_labels(train_features, train_labels, classes, "training")
    check_labels(test_features, test_labels, classes, "test")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"training features have {train_features.shape[1]} dimensions and test features "
            f"{test_features.shape[1]}: both must come from one backbone"
        )
    for name, features in (("training", train_features), ("test", test_features)):
        low, high = features.aminmax(dim=1)  # NaN wins in both, and no second [N, d] is needed
        bad = len(features) - int((low.isfinite() & high.isfinite()).sum())
        if bad:
            raise NonFinite(
                f"{bad} of {len(features)} {name} images have an embedding that is not finite: "
                "evaluate with --precision fp32, or an earlier checkpoint"
            )

    penalty, lr = None, protocol.lr or None
    if classifier is None:
        classifier, penalty, lr = _fit(train_features, train_labels, protocol, classes, seed)
    ranking = rank_classes(classifier.logits(test_features))
    knn = knn_accuracy(
        train_features,
        train_labels,
        test_features,
        test_labels,
        classes=classes,
        k=protocol.knn_k,
        temperature=protocol.knn_temperature,
    )
    return Result(
        protocol=protocol.name,
        top1=topk_accuracy(ranking, test_labels, 1),
        top5=topk_accuracy(ranking, test_labels, TOP),
        knn_top1=knn["top1"],
        knn_top5=knn["top5"],
        train_images=len(train_features),
        test_images=len(test_features),
        classes=classes,
        epochs=protocol.epochs,
        batch=protocol.batch_for(len(train_features)),
        penalty=penalty,
        lr=lr,
        trained_on=trained_on,
        seed=seed,
    )


def _fit(
    features: Tensor, labels: Tensor, protocol: Protocol, classes: int, seed: int
) -> tuple[LinearClassifier, float | None, float | None]:
    """The classifier, and the penalty and learning rate that it has, if any."""
    match protocol.solver:
        case "logistic":
            classifier, strength = fit_logistic(features, labels, classes=classes, seed=seed)
            return classifier, strength, None
        case "closed-form":
            standardize = protocol.standardize
            ridge = choose_ridge(
                features, labels, classes=classes, seed=seed, standardize=standardize
            )
            classifier = fit_closed_form(
                features, labels, classes=classes, ridge=ridge, standardize=standardize
            )
            return classifier, ridge, None
        case "sgd-sweep":
            classifier, (lr, decay) = fit_sweep(
                features, labels, classes=classes, protocol=protocol, seed=seed
            )
            return classifier, decay, lr
        case "sgd" | "lars":
            fit = fit_sgd if protocol.solver == "sgd" else fit_lars
            classifier = fit(features, labels, classes=classes, protocol=protocol, seed=seed)
            return classifier, None, protocol.lr
