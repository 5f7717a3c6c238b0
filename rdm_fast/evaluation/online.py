"""How good the embeddings are while a run goes on: kNN on a bounded bank of training images."""

import numpy as np
import torch
from torch import nn

from rdm_fast.config import Config
from rdm_fast.data import ImageSet
from rdm_fast.data.subset import Subset
from rdm_fast.evaluation.features import embed
from rdm_fast.evaluation.knn import knn_accuracy

BATCH = 256
NEIGHBOURS = 20


def knn_top1(
    backbone: nn.Module,
    train: ImageSet,
    test: ImageSet | None,
    config: Config,
    device: torch.device,
) -> float | None:
    """Top-1 accuracy in percent of weighted kNN on embeddings; every rank embeds its share.

    The bank is log.knn_bank labelled training images at most, evenly spread, so memory does not
    grow with the data set. Images that cannot be read are left out. None where training or test
    images have no labels.
    """
    if train.labels is None or test is None or test.labels is None:
        return None
    labelled = np.flatnonzero(train.labels >= 0)
    keep = min(len(labelled), config.log.knn_bank)
    chosen = labelled[np.linspace(0, len(labelled) - 1, keep).round().astype(np.int64)]
    if keep < NEIGHBOURS:
        return None

    bank, bank_images = embed(backbone, Subset(train, chosen), config, device, batch=BATCH)
    tests, test_images = embed(backbone, test, config, device, batch=BATCH)
    if len(bank) < NEIGHBOURS:
        return None
    accuracy = knn_accuracy(
        bank,
        torch.from_numpy(train.labels[chosen])[bank_images],
        tests,
        torch.from_numpy(test.labels)[test_images],
        classes=len(train.classes),
        k=NEIGHBOURS,
    )
    return accuracy["top1"]
