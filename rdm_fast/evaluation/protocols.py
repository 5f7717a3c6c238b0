"""Named settings of linear evaluation. Nothing here imports torch.

The reference protocols are those of the RDM paper's released code (arXiv:2303.02387;
PKU-ML/Rank-Differential-Mechanism), with one difference: each image is embedded once, from its
evaluation view, and cached. --augment draws a new crop and flip of every training image in each
epoch, as the reference does (`rdm_fast.evaluation.train_on_views`).
"""

import math
from dataclasses import dataclass
from typing import Literal

from rdm_fast.config.checks import require

Solver = Literal["sgd", "lars", "sgd-sweep", "closed-form", "logistic"]
ITERATED = ("sgd", "lars")
"""Solvers with one learning rate, which can also train on random views (--augment)."""
Schedule = Literal["steps", "cosine"]
Init = Literal["default", "normal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How a linear classifier is fitted to frozen embeddings, and how neighbors vote.

    The closed form uses only `standardize` and the kNN fields, the logistic probe only the latter.
    """

    name: str
    """Name on the command line."""
    solver: Solver
    """sgd, lars (SGD with layer-wise trust ratios), sgd-sweep (SGD with every pair of `lrs` and
    `weight_decays` at once), closed-form (ridge regression), or logistic."""
    epochs: int = 0
    """Passes over the training embeddings."""
    batch: int = 256
    """Embeddings in one update; see `batch_for`."""
    drop_last: bool = True
    """Leave out the images of an epoch that fill no batch; otherwise they are a smaller one."""
    lr: float = 0.0
    """Learning rate of the first epoch, for `batch` images; never rescaled."""
    schedule: Schedule = "cosine"
    """cosine falls to 0, steps multiplies by 0.1 at each milestone; both change once an epoch."""
    milestones: tuple[float, ...] = ()
    """Fractions of the epochs after which schedule=steps lowers the learning rate."""
    weight_decay: float = 0.0
    """Weight decay of weight and bias."""
    lrs: tuple[float, ...] = ()
    """Candidates for lr in solver=sgd-sweep."""
    weight_decays: tuple[float, ...] = ()
    """Candidates for weight_decay in solver=sgd-sweep."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    layer_decay: float = 1.0
    """Fine-tuning: factor of the learning rate from one layer to the one below."""
    init: Init = "default"
    """default is torch.nn.Linear's uniform; normal is N(0, 0.01^2) with zero bias."""
    standardize: bool = False
    """Fit to embeddings with zero mean and unit variance in each dimension."""
    trust_coefficient: float = 0.001
    """Trust coefficient of LARS without clipping (apex's LARC, clip=False)."""
    knn_k: int = 20
    """Number of neighbors that vote."""
    knn_temperature: float = 0.07
    """Temperature T of a vote exp(cosine / T)."""

    def __post_init__(self) -> None:
        has_epochs = self.epochs >= 1 and self.batch >= 1
        require(
            self.solver not in ITERATED or (has_epochs and self.lr > 0),
            f"protocol {self.name} has epochs={self.epochs}, batch={self.batch} and lr={self.lr}: "
            f"solver={self.solver} needs 1 or more epochs and images, and a positive lr",
        )
        require(
            self.solver != "sgd-sweep" or (has_epochs and bool(self.lrs and self.weight_decays)),
            f"protocol {self.name}: solver=sgd-sweep needs epochs, a batch, and candidates in lrs "
            "and weight_decays",
        )
        require(
            (self.schedule == "steps") == bool(self.milestones),
            f"protocol {self.name} has schedule={self.schedule} with milestones={self.milestones}: "
            "steps needs milestones, cosine has none",
        )

    def lr_at(self, epoch: int) -> float:
        """Learning rate in an epoch, counted from 0."""
        return self.lr * self.decay_at(epoch)

    def decay_at(self, epoch: int) -> float:
        """Learning rate in an epoch divided by that of the first."""
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return 0.1 ** sum(epoch >= round(share * self.epochs) for share in self.milestones)

    def batch_for(self, images: int) -> int:
        """Images in one update on a training set of this size.

        A set smaller than `batch` is one batch, at the same learning rate. Solvers without epochs
        use all images at once.
        """
        return min(self.batch, images) if self.epochs else images

    def images_per_epoch(self, images: int, batch: int) -> int:
        """Images of a training set of this size on which an epoch trains."""
        return images - images % batch if self.drop_last else images


def _steps(name: str, lr: float) -> Protocol:
    return Protocol(
        name=name, solver="sgd", epochs=100, lr=lr, schedule="steps", milestones=(0.6, 0.8)
    )


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="closed-form", solver="closed-form"),
        Protocol(name="logistic", solver="logistic", standardize=True),
        # The reference has no offline probe for CIFAR: these are the learning rate and batch of
        # its online classifier, without warm-up.
        Protocol(name="reference-cifar", solver="sgd", epochs=100, lr=0.1),
        _steps("solo-cifar", lr=0.1),  # solo-learn's general_linear.sh; it has none for CIFAR
        _steps("reference-imagenet100", lr=30.0),  # rdmsimsiam_linear.sh
        _steps("reference-imagenet100-byol", lr=0.3),  # rdmbyol_linear.sh
        Protocol(  # main_lincls.py --lars: lr is 0.1 * batch / 256, its DataLoader drops nothing
            name="reference-imagenet",
            solver="lars",
            epochs=90,
            batch=4096,
            drop_last=False,
            lr=1.6,
            init="normal",
        ),
        Protocol(
            name="sgd-sweep",
            solver="sgd-sweep",
            epochs=30,
            standardize=True,
            lrs=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
            weight_decays=(0.0, 1e-5, 1e-4, 1e-3),
        ),
    )
}
"""Every named protocol for frozen embeddings."""

FINETUNE = Protocol(name="finetune", solver="sgd", epochs=50, lr=0.02)
"""Trains all weights on random views, from the checkpoint; not a published setting."""

AUTO = {
    "digits": "logistic",
    "folder": "closed-form",
    "webdataset": "closed-form",
    "hf": "closed-form",
}
"""Default protocol by data set: few images, or no setting to tune; else reference-cifar."""
