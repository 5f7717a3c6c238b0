"""Named settings of linear evaluation. Nothing here imports torch.

The reference protocols are those of the RDM paper's released code (arXiv:2303.02387;
PKU-ML/Rank-Differential-Mechanism), with one difference: embeddings are computed once, from the
evaluation view of each image, and cached. With --augment the training images are cropped and
flipped anew in every epoch, as the reference does (`rdm_fast.evaluation.train_on_views`).
"""

import math
from dataclasses import dataclass
from typing import Literal

from rdm_fast.errors import UsageError

Solver = Literal["sgd", "lars", "sgd-sweep", "closed-form", "logistic"]
ITERATED = ("sgd", "lars")
"""Those with one learning rate, which can also be trained on views that are drawn anew."""
Schedule = Literal["steps", "cosine"]
Init = Literal["default", "normal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How a linear classifier is fitted to frozen embeddings, and how neighbors vote.

    The closed form uses `standardize` and the kNN fields only, the logistic probe only the latter.
    """

    name: str
    """Name on the command line."""
    solver: Solver
    """sgd, lars (SGD with layer-wise trust ratios), sgd-sweep (SGD with every pair of `lrs` and
    `weight_decays` at once), closed-form (ridge regression), or logistic."""
    epochs: int = 0
    """Passes over the training embeddings."""
    batch: int = 256
    """Embeddings in one update; a smaller training set is one batch. See `batch_for`."""
    lr: float = 0.0
    """Learning rate of the first epoch, for `batch` as it stands here; never rescaled."""
    schedule: Schedule = "cosine"
    """cosine falls to 0; steps multiplies by 0.1 at each milestone. Both move once an epoch."""
    milestones: tuple[float, ...] = ()
    """Shares of the epochs after which schedule=steps lowers the learning rate."""
    weight_decay: float = 0.0
    """Weight decay of weight and bias."""
    lrs: tuple[float, ...] = ()
    """Candidates for lr, of solver=sgd-sweep."""
    weight_decays: tuple[float, ...] = ()
    """Candidates for weight_decay, of solver=sgd-sweep."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    init: Init = "default"
    """default is torch.nn.Linear's uniform one; normal draws N(0, 0.01^2) with zero bias."""
    standardize: bool = False
    """Fit on embeddings with zero mean and unit variance in each dimension of the training set."""
    trust_coefficient: float = 0.001
    """Trust coefficient of LARS, whose learning rate is not clipped (apex's LARC, clip=False)."""
    knn_k: int = 20
    """Neighbors that vote."""
    knn_temperature: float = 0.07
    """Temperature T of a vote exp(cosine / T)."""

    def __post_init__(self) -> None:
        if self.solver in ITERATED and (self.epochs < 1 or self.batch < 1 or self.lr <= 0):
            raise ValueError(
                f"protocol {self.name} has epochs={self.epochs}, batch={self.batch} and "
                f"lr={self.lr}: solver={self.solver} needs at least 1 epoch, a batch of at least "
                "1 and a positive lr"
            )
        if self.solver == "sgd-sweep" and (
            self.epochs < 1 or self.batch < 1 or not self.lrs or not self.weight_decays
        ):
            raise ValueError(
                f"protocol {self.name}: solver=sgd-sweep needs epochs, a batch, and candidates in "
                "lrs and weight_decays"
            )
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError(
                f"protocol {self.name} has schedule={self.schedule} with "
                f"milestones={self.milestones}: steps needs milestones, cosine has none"
            )

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        return self.lr * self.share_at(epoch)

    def share_at(self, epoch: int) -> float:
        """What an epoch's learning rate is of the first one's."""
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return 0.1 ** sum(epoch >= round(share * self.epochs) for share in self.milestones)

    def batch_for(self, images: int) -> int:
        """Images of one update on a training set of this size.

        A set smaller than `batch` is one batch, at the same learning rate; results say which
        batch was used. Solvers without epochs use all images at once.
        """
        return min(self.batch, images) if self.epochs else images


def _imagenet100(name: str, lr: float) -> Protocol:
    return Protocol(
        name=name, solver="sgd", epochs=100, lr=lr, schedule="steps", milestones=(0.6, 0.8)
    )


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="closed-form", solver="closed-form"),
        Protocol(name="logistic", solver="logistic", standardize=True),
        # The reference reports its online classifier for CIFAR and ships no offline probe; this
        # one has that classifier's learning rate and batch, without warm-up.
        Protocol(name="reference-cifar", solver="sgd", epochs=100, lr=0.1),
        # solo-learn has no script for CIFAR: its general_linear.sh, as it stands
        Protocol(
            name="solo-cifar",
            solver="sgd",
            epochs=100,
            lr=0.1,
            schedule="steps",
            milestones=(0.6, 0.8),
        ),
        _imagenet100("reference-imagenet100", lr=30.0),  # rdmsimsiam_linear.sh
        _imagenet100("reference-imagenet100-byol", lr=0.3),  # rdmbyol_linear.sh
        Protocol(  # main_lincls.py --lars: lr is 0.1 * batch / 256
            name="reference-imagenet", solver="lars", epochs=90, batch=4096, lr=1.6, init="normal"
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
"""Every named protocol of frozen embeddings."""

FINETUNE = Protocol(name="finetune", solver="sgd", epochs=50, lr=0.02)
"""All weights trained on views drawn anew, from the checkpoint; settings that suit most, and are
nobody's published ones."""


def find_protocol(name: str, data: str) -> Protocol:
    """The protocol of that name.

    Args:
        name: one of PROTOCOLS, or auto: logistic for digits, which are few; the closed form for
            one's own images, as it has no setting that might not suit them; else the reference's
            for CIFAR.
        data: the data set that is evaluated.

    Raises:
        UsageError: there is none; the message names those there are.
    """
    if name == "auto":
        own = {"digits": "logistic", "folder": "closed-form", "webdataset": "closed-form"}
        name = own.get(data, "reference-cifar")
    if name not in PROTOCOLS:
        raise UsageError(
            f"--protocol {name} is not a protocol: choose one of {', '.join(PROTOCOLS)}"
        )
    return PROTOCOLS[name]
