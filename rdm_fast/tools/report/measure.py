"""Spectra, the filter's response and embeddings of a run.

Spectra are those that training recorded. For a run without them, and for embeddings, the newest
sound checkpoint is loaded. Its spectra are those of training views in training mode, over whole
global batches; its embeddings are those of evaluation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rdm_fast.config import Config
from rdm_fast.data import ImageSet, build_loader, load
from rdm_fast.data.images.sets import Subset
from rdm_fast.errors import DataError, InputMissing
from rdm_fast.evaluation.features import embed
from rdm_fast.evaluation.loaded_backbone import find_checkpoint, load_method
from rdm_fast.methods import Branches, Method
from rdm_fast.runtime.distributed import print0
from rdm_fast.runtime.precision import autocast
from rdm_fast.telemetry import read_spectra
from rdm_fast.tools.report.read import Run

BATCHES = 4
"""Global batches over which the spectra of a checkpoint are averaged."""
ROWS = 256
"""Images in one forward pass of the backbone for embeddings."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Spectra:
    """Means over views, strongest direction first; all [n] float64."""

    step: int
    online: Array  # eigenvalues of the online branch's output
    target: Array
    projection: Array
    s: Array  # singular values of the input of predictor or filter
    response: Array  # factor of each of these directions; NaN for those that are cut off


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of some test images."""

    rows: NDArray[np.float32]  # [n, d_emb]
    labels: NDArray[np.int64] | None
    classes: list[str]


def recorded(run: Run) -> list[Spectra]:
    """The spectra in a run's `spectrum.jsonl`, in the order of steps; [] without that file.

    Raises:
        DataError: the file is damaged beyond a line or two.
    """
    file = run.path / "spectrum.jsonl"
    try:
        found = [_parse(record) for record in read_spectra(file)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} cannot be used ({type(error).__name__})") from error
    return [spectra for spectra in found if np.isfinite(spectra.projection).all()]


def _parse(record: dict[str, Any]) -> Spectra:
    names = ("online", "target", "projection", "s", "response")
    arrays = {name: np.asarray(record[name], dtype=np.float64) for name in names}
    if any(array.ndim != 1 or not len(array) for array in arrays.values()):
        raise ValueError("a spectrum is a list of numbers")
    return Spectra(int(record["step"]), **arrays)


def measure(
    run: Run, device: torch.device, *, data_root: str | None, images: int, spectra: bool
) -> tuple[Spectra | None, Embeddings | None]:
    """Run a checkpoint over some of its data.

    Args:
        run: its configuration must be known.
        device: where the checkpoint runs.
        data_root: where the data set is now, if it has moved.
        images: largest number of test images to embed; 0 for none.
        spectra: whether to measure spectra.

    Raises:
        UserError: there is no sound checkpoint, or its data set is missing.
    """
    if run.config is None:
        raise InputMissing("without a configuration its checkpoint cannot be run")
    config = replace(run.config, data=replace(run.config.data, loader="auto", download=False))
    if data_root is not None:
        config = replace(config, data=replace(config.data, root=data_root))
    method, step = load_method(find_checkpoint(run.path), config)
    method = method.to(device)
    # Embeddings first: batches in training mode move the running statistics of batch norms.
    embeddings = _embeddings(method, config, device, images) if images else None
    if not spectra:
        return None, embeddings
    return _spectra(method, _branches(method, config, device), step), embeddings


@torch.no_grad()
def _branches(method: Method, config: Config, device: torch.device) -> Iterator[Branches]:
    """Both branches for the first batches of the epoch after the last one."""
    images = load(config.data, "train")
    loader = build_loader(config, images, rank=0, world_size=1, device=device)
    method.train()
    for batch in islice(loader.epoch(config.optim.epochs, 0), BATCHES):
        with autocast(config.precision, device):
            yield method.branches(*batch.views)


def _spectra(method: Method, batches: Iterator[Branches], step: int) -> Spectra:
    """The mean over batches of the spectra that training records for one batch."""
    records = [method.spectra(branches, profile=True).record() for branches in batches]
    stacks = {name: [np.asarray(record[name]) for record in records] for name in records[0]}
    means = {name: np.mean(stack, axis=0) for name, stack in stacks.items()}
    return _parse(means | {"step": step})


def _embeddings(method: Method, config: Config, device: torch.device, most: int) -> Embeddings:
    """Of test images, evenly spread; of training images if there is no usable test set."""
    every: ImageSet
    try:
        every = load(config.data, "test")
    except (InputMissing, DataError) as error:
        print0(f"warning: embeddings of training images: {error}")
        every = load(config.data, "train")
    chosen = np.linspace(0, len(every) - 1, min(most, len(every))).round().astype(np.int64)
    images = Subset(every, chosen)
    backbone = method.encoders[config.branch()].backbone
    rows, kept = embed(backbone, images, config, device, batch=ROWS)
    labels = None if images.labels is None else images.labels[kept.numpy()]
    return Embeddings(rows.numpy(), labels, list(images.classes))
