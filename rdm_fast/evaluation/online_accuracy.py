"""Accuracies while a run trains: kNN on its backbone's embeddings, and its online probe's.

They are a report and never end a run: without usable test images, one line says why there are none.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rdm_fast.config import Config
from rdm_fast.config.run import Branch
from rdm_fast.data import ImageSet, load, require_same_images
from rdm_fast.data.images.sets import Subset, labeled, require_channels
from rdm_fast.errors import DataError, Interrupted, UserError, message_of
from rdm_fast.evaluation.accuracy import rank_classes, topk_accuracy
from rdm_fast.evaluation.features import embed
from rdm_fast.evaluation.knn import knn_accuracy
from rdm_fast.evaluation.probe import LinearClassifier
from rdm_fast.evaluation.score import require_two_classes
from rdm_fast.methods import Encoder
from rdm_fast.runtime.distributed import all_reduce_max, print0, rank

BATCH = 256
NEIGHBORS = 20


class OnlineAccuracy:
    """Measures a run's backbone; the test images are read at the first measurement."""

    def __init__(
        self, config: Config, train: ImageSet, device: torch.device, bad_files: Path | None
    ) -> None:
        """`bad_files` is the table that lists test images that cannot be used."""
        self.config, self.train, self.device = config, train, device
        self._bad_files = bad_files
        self._silent: set[str] = set()

    def measure(
        self, encoders: Mapping[Branch, Encoder], probe: LinearClassifier | None = None
    ) -> dict[str, float]:
        """Top-1 accuracies in percent on the test images; every rank embeds its share.

        Args:
            encoders: of a method; their backbones are on the device, as for `embed`.
            probe: the online classifier, if there is one.

        Returns:
            `knn_top1`, of weighted kNN with a bank of at most log.knn_bank labeled training
            images, evenly spread, of which NEIGHBORS vote, or all if there are fewer;
            `knn_top1_target`, the same of the target weights, if there are any; and `probe_top1`,
            of the probe. Unreadable images are skipped. Empty if there are no usable images, which
            is said once.
        """
        found: dict[str, float] = {}
        if self._test is None:
            return found
        try:
            for branch, encoder in encoders.items():
                is_online = branch == "online"
                suffix, own_probe = ("", probe) if is_online else (f"_{branch}", None)
                measured = self._measure(self._test, encoder.backbone, own_probe)
                found |= {f"{key}{suffix}": value for key, value in measured.items()}
        except DataError as error:  # every rank has it
            self._say(str(error))
            return {}
        return found

    def _measure(
        self, test: ImageSet, backbone: nn.Module, probe: LinearClassifier | None
    ) -> dict[str, float]:
        bank = labeled(self.train, "training")
        most = min(len(bank), self.config.log.knn_bank)
        bank = Subset(bank, np.linspace(0, len(bank) - 1, most).round().astype(np.int64))
        (neighbors, of_neighbors), (queries, labels) = (
            self._embed(backbone, images) for images in (bank, test)
        )
        k = min(NEIGHBORS, len(neighbors))
        classes = len(self.train.classes)
        top1, _ = knn_accuracy(neighbors, of_neighbors, queries, labels, classes=classes, k=k)
        if k < NEIGHBORS:
            self._say(f"all {k} training images vote in kNN, not {NEIGHBORS} neighbors", "warning")
        found = {"knn_top1": top1}
        if probe is not None:
            ranking = rank_classes(probe.logits(queries), 1)
            found["probe_top1"] = topk_accuracy(ranking, labels, 1)
        return found

    def _embed(self, backbone: nn.Module, images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and labels of those that can be read, however few: training counts the bad."""
        data = replace(self.config.data, on_bad_image="skip", max_bad=1.0)
        lenient = replace(self.config, data=data)
        features, kept = embed(backbone, images, lenient, self.device, batch=BATCH)
        assert images.labels is not None
        return features, torch.from_numpy(images.labels)[kept]

    @cached_property
    def _test(self) -> ImageSet | None:
        """The labeled test images; None if any rank cannot use them."""
        config, images, why = self.config, None, ""
        try:
            train = labeled(self.train, "training")
            require_two_classes(torch.from_numpy(train.labels))
            images = labeled(load(config.data, "test", self._bad_files), "test")
            require_channels(images, config.augment, "the test set")
        except Interrupted:
            raise
        except (UserError, OSError) as error:
            why = message_of(error)
        failed = all_reduce_max(rank() + 1 if why else 0, self.device)
        if failed:
            self._say(why or f"rank {failed - 1} cannot use the test images")
            return None
        assert images is not None
        try:
            require_same_images(images, config.data, self.device)
        except DataError as error:  # every rank has it
            self._say(str(error))
            return None
        return images

    def _say(self, text: str, kind: str = "no kNN while training") -> None:
        if text not in self._silent:
            self._silent.add(text)
            print0(f"{kind}: {text}")
