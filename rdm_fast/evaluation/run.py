"""The whole evaluation of a backbone, from images to the saved result."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from rdm_fast.data import ImageSet, load
from rdm_fast.data.images.sets import labeled
from rdm_fast.errors import CannotCreate, OutputFailed, message_of
from rdm_fast.evaluation.features import (
    Labeled,
    cached_features,
    embed,
    recompute_statistics,
    write_tensors,
)
from rdm_fast.evaluation.loaded_backbone import FOLDER, LoadedBackbone
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.evaluation.score import Result, require_two_classes, score
from rdm_fast.evaluation.train_on_views import train_on_views
from rdm_fast.run.folder import refuse_links
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.cudnn import choose_algorithms
from rdm_fast.runtime.distributed import print0, rank
from rdm_fast.spectrum import effective_rank, eigenvalues

FIT = 4
"""GPU memory that scoring needs, as a multiple of the embeddings."""
SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")
WHICH = {"train": "training", "test": "test"}


def evaluate(
    loaded: LoadedBackbone, command: EvaluateCommand, device: torch.device
) -> Result | None:
    """Embed all labeled images once, score the embeddings, print and save the result.

    Args:
        loaded: the backbone and its data; fine-tuning changes its weights.
        command: protocol, outputs and so on.
        device: where the backbone and the probe run.

    Returns:
        The result on rank zero, None on the others.

    Raises:
        UserError: the data, the protocol or an output cannot be used (see its subclasses).
    """
    choose_algorithms(deterministic=loaded.config.step.deterministic)
    data = loaded.config.data
    protocol = command.protocol_for(data.name)
    _require_outputs(loaded.folder, command)
    whole = replace(data, fraction=1.0)  # backbones that saw different shares are compared
    sets = [labeled(load(whole, split), WHICH[split]) for split in SPLITS]
    require_two_classes(torch.from_numpy(sets[0].labels))
    classes = len(sets[0].classes)
    own_key = _prepare(loaded, sets[0], command, device)
    classifier = None
    if command.augment or command.finetune:
        classifier = train_on_views(
            loaded.backbone, sets[0], loaded.config, protocol, classes=classes,
            seed=command.seed, device=device, finetune=command.finetune,
        )  # fmt: skip
    embedded = [
        _embed(loaded, split, images, command, device, own_key)
        for split, images in zip(SPLITS, sets, strict=True)
    ]
    spectrum = _spectrum(loaded, sets[1], command, device)
    if rank() != 0:
        return None
    if command.features_out:
        _write_features(Path(command.features_out), embedded)
    place = _choose_place(embedded, device)
    train, test = ((features.to(place), labels.to(place)) for features, labels in embedded)
    if classifier is not None:
        classifier = classifier.to(place)

    def save(result: Result) -> Path:
        return _save(result, spectrum, loaded, command)

    def keep(result: Result) -> None:
        with suppress(OutputFailed):  # tried again at the end, after the result is printed
            save(result)

    result = score(
        train, test, protocol,
        classes=classes, seed=command.seed, classifier=classifier, keep=keep,
    )  # fmt: skip
    _report(result, spectrum, _which(loaded, command))
    print0(f"saved in {save(result)}")
    return result


def _require_outputs(folder: Path, command: EvaluateCommand) -> None:
    """Find out before hours of embedding whether the results can be written."""
    if command.features_out and Path(command.features_out).exists():
        raise CannotCreate(f"--features-out {command.features_out} exists: name a new file")
    if not command.out and folder.name == FOLDER:
        refuse_links(folder.parent)
    try:
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotCreate(
            f"{'--out ' if command.out else ''}{folder} cannot be created ({error.strerror}): "
            "give --out a writable folder"
        ) from error


def _prepare(
    loaded: LoadedBackbone, train: ImageSet, command: EvaluateCommand, device: torch.device
) -> dict[str, object] | None:
    """Put the networks on the device, with the batch-norm statistics that were asked for.

    Returns:
        What embeddings depend on besides the checkpoint and their images, empty for those of
        the online branch as it is; None if they must not be cached.
    """
    loaded.whole.to(device)
    key = _which(loaded, command)
    if command.bn == "recompute":
        key |= {"bn_images": train.digest, "bn_batch": command.batch}
        if not recompute_statistics(
            loaded.whole, train, loaded.config, device, batch=command.batch
        ):
            return None
    return None if command.finetune else key


def _which(loaded: LoadedBackbone, command: EvaluateCommand) -> dict[str, object]:
    """Branch and statistics where they are not the online branch's own."""
    branch = {"branch": loaded.branch} if loaded.branch == "target" else {}
    return branch | ({} if command.bn == "own" else {"bn": command.bn})


def _embed(
    loaded: LoadedBackbone,
    split: str,
    images: ImageSet,
    command: EvaluateCommand,
    device: torch.device,
    own_key: dict[str, object] | None,
) -> Labeled:
    """Embeddings and labels of a set; cached, unless `_prepare` says otherwise."""

    def compute() -> Labeled:
        assert images.labels is not None
        features, kept = embed(loaded.backbone, images, config, device, batch=command.batch)
        return features, torch.from_numpy(images.labels)[kept]

    config = loaded.config
    key: dict[str, object] = {
        "checkpoint": loaded.key,
        "data": images.digest,
        "size": config.augment.size,
        "interpolation": config.augment.interpolation,
        "mean": config.augment.mean,
        "std": config.augment.std,
        "split": split,
        "precision": config.precision,
        "device": device.type,
    }
    if own_key is None:
        return compute()
    key |= own_key
    file = loaded.folder / f"{loaded.name}-{split}.safetensors"
    return cached_features(file, key, compute, whole=len(images))


def _choose_place(embedded: list[Labeled], device: torch.device) -> torch.device:
    """The device for scoring: that of the backbone, if the embeddings fit there FIT times."""
    if device.type != "cuda":
        return device
    size = sum(tensor.nbytes for pair in embedded for tensor in pair)
    free, _ = torch.cuda.mem_get_info(device)
    if FIT * size <= free:
        return device
    print0(
        f"embeddings of {size / 2**30:.1f} GiB are probed on the CPU: {free / 2**30:.1f} GiB "
        "are free on the GPU"
    )
    return torch.device("cpu")


def _spectrum(
    loaded: LoadedBackbone, test: ImageSet, command: EvaluateCommand, device: torch.device
) -> Tensor | None:
    """Eigenvalues of the test images' projections; None without a projector."""
    if loaded.projector is None or command.finetune:
        return None
    projections, _ = embed(loaded.whole, test, loaded.config, device, batch=command.batch)
    return eigenvalues(projections)


def _write_features(file: Path, embedded: list[Labeled]) -> None:
    tensors = {
        f"{split}_{name}": tensor
        for split, pair in zip(SPLITS, embedded, strict=True)
        for name, tensor in zip(("features", "labels"), pair, strict=True)
    }
    try:
        if file.suffix == ".npz":
            file.parent.mkdir(parents=True, exist_ok=True)
            arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
            with atomic_files.replacing(file) as partial, partial.open("r+b") as stream:
                np.savez(stream, **arrays)
        else:
            write_tensors(file, tensors)
    except (SafetensorError, OSError) as error:
        raise CannotCreate(
            f"--features-out {file} cannot be written ({message_of(error)}): name another file"
        ) from error
    print0(f"embeddings and labels of both sets are in {file}")


def _save(
    result: Result, spectrum: Tensor | None, loaded: LoadedBackbone, command: EvaluateCommand
) -> Path:
    """Write the result, with the eigenvalues of the test images' projections."""
    file = loaded.folder / f"{loaded.name}-{result.label}.json"
    plain = asdict(result) | {"branch": loaded.branch, "bn": command.bn}
    if spectrum is not None:
        directions = float(effective_rank(spectrum))
        plain |= {"effective_rank": directions, "eigenvalues": spectrum.flip(0).tolist()}
    try:
        atomic_files.replace(file, json.dumps(plain, indent=1) + "\n")
    except OSError as error:
        raise OutputFailed(
            f"{file} cannot be written ({error.strerror}), so the result is only printed: make "
            "room there, or give another --out"
        ) from error
    return file


def _report(result: Result, spectrum: Tensor | None, which: Mapping[str, object]) -> None:
    title = f"{result.test_images} test images of {result.classes} classes, protocol "
    lines = [
        ", ".join([title + result.protocol, *(f"{name} {value}" for name, value in which.items())]),
        f"  linear probe    top-1 {result.top1:6.2f} %   top-5 {result.top5:6.2f} %{result.chosen}",
        f"  kNN             top-1 {result.knn_top1:6.2f} %   top-5 {result.knn_top5:6.2f} %",
    ]
    if spectrum is not None:
        lines += [f"  effective rank of the projections   {float(effective_rank(spectrum)):.1f}"]
    if result.lowered:
        lines += [f"warning: few images: {'; '.join(result.lowered)}"]
    print0(*lines)
