"""What takes a checkpoint: spectra of both branches, the filter's response, embeddings.

The run's newest sound checkpoint is loaded. Spectra are those of training: views as training draws
them, in training mode, whole global batches. Embeddings are those of evaluation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdm_fast import checkpoint
from rdm_fast.config import Config, FilterConfig
from rdm_fast.data import ImageSet, build_loader, evaluation_batches, load
from rdm_fast.data.subset import Subset
from rdm_fast.decomposition import decompose, right_vectors, smaller_gram
from rdm_fast.errors import InputMissing
from rdm_fast.evaluation.features import extract
from rdm_fast.evaluation.run import find_checkpoint
from rdm_fast.methods import Branches, Method, build_method
from rdm_fast.report.read import Run
from rdm_fast.spectrum import branch_spectra
from rdm_fast.step import AUTOCAST

BATCHES = 4
"""Global batches over which spectra are averaged."""
ROWS = 256
"""Images in one forward pass of the backbone for embeddings."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Spectra:
    """Means over views and batches, strongest direction first; all [n] float64."""

    online: Array  # eigenvalues of the online branch's output
    target: Array
    projection: Array
    strength: Array  # singular values s of the projections that the predictor or filter takes
    response: Array  # g(s), measured; NaN for directions that are cut off in any batch
    batch: int  # images in a batch


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of some test images."""

    rows: NDArray[np.float32]  # [n, d_emb]
    labels: NDArray[np.int64] | None
    classes: list[str]


@dataclass(frozen=True)
class Measurement:
    step: int
    spectra: Spectra
    embeddings: Embeddings | None


def measure(run: Run, device: torch.device, *, data_root: str | None, images: int) -> Measurement:
    """Run a checkpoint over some of its data.

    Args:
        run: its configuration must be known.
        device: where to run it.
        data_root: where the data set is, if it has moved.
        images: most test images to embed; 0 for none.

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
    checkpoint.load_strict(method, snapshot.model, f"checkpoint {path}")
    method = method.to(device)
    train = load(config.data, "train")
    return Measurement(
        snapshot.step,
        _mean([_spectra(method, each) for each in _branches(method, config, train, device)]),
        _embeddings(method, config, train, device, images) if images else None,
    )


# ---- spectra ---------------------------------------------------------------------------------


@torch.no_grad()
def _branches(
    method: Method, config: Config, images: ImageSet, device: torch.device
) -> Iterator[Branches]:
    """Both branches for the first batches of an epoch that training does not reach."""
    loader = build_loader(config, images, rank=0, world_size=1, device=device)
    dtype = AUTOCAST[config.precision]
    method.train()
    for batch in islice(loader.epoch(config.optim.epochs, 0), BATCHES):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            yield method.branches(batch.view1, batch.view2)


@torch.no_grad()
def _spectra(method: Method, branches: Branches) -> Spectra:
    spectra = branch_spectra(branches.online, branches.target, branches.projection, method.filter)
    if method.filter is None:
        rows = zip(branches.projection, branches.online, strict=True)
        pairs = [measured_response(z, p) for z, p in rows]
    else:
        taken = branches.online if method.filter.location == "online" else branches.target
        parts = [decompose(smaller_gram(z[None]), z[None], method.filter) for z in taken]
        pairs = [(part.s[0], part.g[0].where(part.g[0] != 0, torch.nan)) for part in parts]
    strength, response = (torch.stack(views).mean(dim=0) for views in zip(*pairs, strict=True))
    return Spectra(
        online=_descending(spectra.online),
        target=_descending(spectra.target),
        projection=_descending(spectra.projection),
        strength=_descending(strength),
        response=_descending(response),
        batch=branches.projection.shape[1],
    )


def _descending(ascending: Tensor) -> Array:
    array: Array = ascending.flip(0).double().cpu().numpy()
    return array


def measured_response(z: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """By what a predictor scales each principal direction of its input.

        g(s_i) = (Z v_i)^T (P v_i) / s_i^2,   Z = U S V^T

    the slope of the prediction's i-th coordinate on the projection's.

    Args:
        z: projections, [B, D].
        p: what the predictor made of them, [B, D].

    Returns:
        s and g(s), [n] float64, ascending s; g is NaN for directions that are cut off.
    """
    V, kept = right_vectors(z[None], FilterConfig(sigma=0.0))  # g = 1 above the cutoff
    onto, made = (rows.to(torch.float64) @ V[0] for rows in (z, p))
    squares = onto.square().sum(dim=0)
    g = ((onto * made).sum(dim=0) / squares).where(kept[0] == 1, torch.nan)
    return squares.sqrt(), g


def _mean(batches: list[Spectra]) -> Spectra:
    names = ("online", "target", "projection", "strength", "response")
    means = {n: np.mean([getattr(each, n) for each in batches], axis=0) for n in names}
    return Spectra(**means, batch=batches[0].batch)


# ---- embeddings ------------------------------------------------------------------------------


def _embeddings(
    method: Method, config: Config, train: ImageSet, device: torch.device, most: int
) -> Embeddings:
    try:
        every = load(config.data, "test")
    except InputMissing:
        every = train
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
