"""How good the embeddings of test images are while a run goes on: kNN, and the online probe."""

import numpy as np
import torch
from torch import nn

from rdm_fast.config import Config
from rdm_fast.data import ImageSet
from rdm_fast.data.subset import Subset
from rdm_fast.evaluation.accuracy import rank_classes, topk_accuracy
from rdm_fast.evaluation.features import embed
from rdm_fast.evaluation.knn import knn_accuracy
from rdm_fast.evaluation.probe import LinearClassifier

BATCH = 256
NEIGHBOURS = 20


def online_accuracies(
    backbone: nn.Module,
    train: ImageSet,
    test: ImageSet | None,
    config: Config,
    device: torch.device,
    probe: LinearClassifier | None = None,
) -> dict[str, float]:
    """Top-1 accuracies in percent on the test images; every rank embeds its share.

    Returns:
        `knn_top1`, weighted kNN on a bank of log.knn_bank labelled training images at most, evenly
        spread, so that memory does not grow with the data set; and `probe_top1`, of the probe if
        one is given. Images that cannot be read are left out. Empty where training or test images
        have no labels.
    """
    if train.labels is None or test is None or test.labels is None:
        return {}
    labelled = np.flatnonzero(train.labels >= 0)
    keep = min(len(labelled), config.log.knn_bank)
    if keep < NEIGHBOURS:
        return {}
    chosen = labelled[np.linspace(0, len(labelled) - 1, keep).round().astype(np.int64)]

    bank, bank_images = embed(backbone, Subset(train, chosen), config, device, batch=BATCH)
    queries, test_images = embed(backbone, test, config, device, batch=BATCH)
    if len(bank) < NEIGHBOURS:
        return {}
    labels = torch.from_numpy(test.labels)[test_images]
    accuracy = knn_accuracy(
        bank,
        torch.from_numpy(train.labels[chosen])[bank_images],
        queries,
        labels,
        classes=len(train.classes),
        k=NEIGHBOURS,
    )
    found = {"knn_top1": accuracy["top1"]}
    if probe is not None:
        found["probe_top1"] = topk_accuracy(rank_classes(probe.logits(queries), 1), labels, 1)
    return found
