"""Spectra, the filter's response and embeddings of a run.

Spectra are those that training recorded. For a run without them, and for embeddings, the newest
sound checkpoint is loaded: spectra are then of views as training draws them, in training mode, of
whole global batches; embeddings are those of evaluation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rdm_fast.config import Config
from rdm_fast.data import ImageSet, build_loader, evaluation_batches, load
from rdm_fast.data.images.sets import Subset
from rdm_fast.errors import DataError, InputMissing
from rdm_fast.evaluation.features import extract
from rdm_fast.evaluation.loaded_backbone import find_checkpoint
from rdm_fast.methods import Branches, Method, build_method
from rdm_fast.models.pretrained import load_strict
from rdm_fast.run import checkpoint
from rdm_fast.runtime.precision import autocast
from rdm_fast.spectrum import branch_spectra
from rdm_fast.telemetry import read_spectra
from rdm_fast.tools.report.read import Run

BATCHES = 4
"""Global batches over which spectra of a checkpoint are averaged."""
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
    s: Array  # singular values of the rows that the predictor or filter takes
    response: Array  # by what it scales these directions; NaN for those that are cut off


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of some test images."""

    rows: NDArray[np.float32]  # [n, d_emb]
    labels: NDArray[np.int64] | None
    classes: list[str]


@dataclass(frozen=True)
class Measurement:
    """What a checkpoint was run for."""

    spectra: Spectra | None
    embeddings: Embeddings | None


def recorded(run: Run) -> list[Spectra]:
    """The spectra that training left in `spectrum.jsonl`, in the order of steps; [] without it.

    Raises:
        DataError: the file is damaged beyond a line or two.
    """
    file = run.path / "spectrum.jsonl"
    try:
        found = [_of_record(record) for record in read_spectra(file)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} cannot be used ({type(error).__name__})") from error
    return [spectra for spectra in found if np.isfinite(spectra.projection).all()]


def _of_record(record: dict[str, Any]) -> Spectra:
    names = ("online", "target", "projection", "s", "response")
    arrays = {name: np.asarray(record[name], dtype=np.float64) for name in names}
    if any(array.ndim != 1 or not len(array) for array in arrays.values()):
        raise ValueError("a spectrum is a list of numbers")
    return Spectra(int(record["step"]), **arrays)


def measure(
    run: Run, device: torch.device, *, data_root: str | None, images: int, spectra: bool
) -> Measurement:
    """Run a checkpoint over some of its data.

    Args:
        run: its configuration must be known.
        device: where to run it.
        data_root: where the data set is, if it has moved.
        images: most test images to embed; 0 for none.
        spectra: whether to take spectra.

    Raises:
        UserError: there is no sound checkpoint, or its data are not there.
    """
    if run.config is None:
        raise InputMissing("without a configuration its checkpoint cannot be run")
    config = replace(run.config, data=replace(run.config.data, loader="auto", download=False))
    if data_root is not None:
        config = replace(config, data=replace(config.data, root=data_root))
    path = find_checkpoint(run.path)
    snapshot = checkpoint.load(path)
    method = build_method(config)
    load_strict(method, snapshot.model, f"checkpoint {path}")
    method = method.to(device)
    return Measurement(
        _spectra(method, _branches(method, config, device), snapshot.step) if spectra else None,
        _embeddings(method, config, device, images) if images else None,
    )


# ---- spectra ---------------------------------------------------------------------------------


@torch.no_grad()
def _branches(method: Method, config: Config, device: torch.device) -> Iterator[Branches]:
    """Both branches for the first batches of an epoch that training does not reach."""
    images = load(config.data, "train")
    loader = build_loader(config, images, rank=0, world_size=1, device=device)
    method.train()
    for batch in islice(loader.epoch(config.optim.epochs, 0), BATCHES):
        with autocast(config.precision, device):
            yield method.branches(*batch.views)


def _spectra(method: Method, batches: Iterator[Branches], step: int) -> Spectra:
    """The mean over batches of what training records of one."""
    records = [
        branch_spectra(
            b.online, b.target, b.projection, method.criterion.filter, profile=True
        ).record()
        for b in batches
    ]
    stacks = {name: [np.asarray(record[name]) for record in records] for name in records[0]}
    means = {name: np.mean(stack, axis=0) for name, stack in stacks.items()}
    return _of_record(means | {"step": step})


# ---- embeddings ------------------------------------------------------------------------------


def _embeddings(method: Method, config: Config, device: torch.device, most: int) -> Embeddings:
    every = _shown(config)
    chosen = np.linspace(0, len(every) - 1, min(most, len(every))).round().astype(np.int64)
    images = Subset(every, chosen)
    batches = evaluation_batches(
        images,
        config.augment,
        batch=ROWS,
        device=device,
        workers=0 if images.pixels is not None else config.data.workers,
    )
    rows = extract(method.backbone, batches, len(images), precision=config.precision)
    return Embeddings(rows.numpy(), images.labels, list(images.classes))


def _shown(config: Config) -> ImageSet:
    """The test images; those of training where there are none."""
    try:
        return load(config.data, "test")
    except InputMissing:
        return load(config.data, "train")
