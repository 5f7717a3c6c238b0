"""Evaluating a backbone from its images to the saved result: what eval_linear.py does."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from rdm_fast.data import ImageSet, load
from rdm_fast.data.images.sets import Subset
from rdm_fast.errors import CannotCreate, DataError
from rdm_fast.evaluation.features import cached_features, embed
from rdm_fast.evaluation.loaded_backbone import Subject
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.evaluation.score import Result, evaluate
from rdm_fast.evaluation.train_on_views import train_on_views
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.distributed import print0, rank
from rdm_fast.spectrum import effective_rank, eigenvalues

FIT = 4
"""Copies of the embeddings that a solver may hold, with room to spare."""
Sets = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(features, labels) of the training and of the test images."""


def evaluate_subject(
    subject: Subject, command: EvaluateCommand, device: torch.device
) -> Result | None:
    """Embed all labeled images once, probe the embeddings, print and save the result.

    Args:
        subject: what is evaluated; fine-tuning changes its backbone.
        command: how.
        device: where the backbone and the probe run.

    Returns:
        The result on rank zero, None on the others.

    Raises:
        UserError: the data, the protocol or an output cannot be used (its subclasses say which).
    """
    protocol = command.protocol_for(subject.config.data.name)
    if command.features_out and Path(command.features_out).exists():
        raise CannotCreate(f"--features-out {command.features_out} exists: name a new file")
    _require_writable(subject.folder, command)
    data = subject.config.data
    train, test = _labeled(load(data, "train")), _labeled(load(data, "test"))
    subject.backbone.to(device)
    classifier = None
    if command.augment or command.finetune:
        classifier = train_on_views(
            subject.backbone, train, subject.config, protocol, classes=len(train.classes),
            seed=command.seed, device=device, finetune=command.finetune,
        )  # fmt: skip
    embedded = _embed(subject, (train, test), command, device)
    spectrum = _spectrum(subject, test, command, device)
    if rank() != 0:
        return None
    (train_features, train_labels), (test_features, test_labels) = embedded
    if command.features_out:
        _write_features(Path(command.features_out), embedded)
    place = _place_for(embedded, device)
    result = evaluate(
        train_features.to(place),
        train_labels.to(place),
        test_features.to(place),
        test_labels.to(place),
        protocol,
        classes=len(train.classes),
        seed=command.seed,
        classifier=classifier.to(place) if classifier is not None else None,
        trained_on="views" if command.augment or command.finetune else "features",
    )
    _report(result, spectrum, subject)
    return result


def _require_writable(folder: Path, command: EvaluateCommand) -> None:
    """Before hours of embedding: its result has to go somewhere."""
    try:
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        flag = f"--out {folder}" if command.out else f"{folder}"
        raise CannotCreate(
            f"{flag} cannot be made ({error.strerror}): give --out a folder that can"
        ) from error


def _labeled(images: ImageSet) -> ImageSet:
    """The images with a label, which a probe needs."""
    if images.labels is None or not (images.labels >= 0).any():
        raise DataError(
            "a linear probe needs labels and these images have none: "
            "arrange them as <root>/train/<class>/ and <root>/test/<class>/"
        )
    with_label = np.flatnonzero(images.labels >= 0)
    return images if len(with_label) == len(images) else Subset(images, with_label)


def _embed(
    subject: Subject,
    sets: tuple[ImageSet, ImageSet],
    command: EvaluateCommand,
    device: torch.device,
) -> Sets:
    """Embeddings and labels of both sets, from the cache if it was made for the same everything."""
    config, found = subject.config, []
    for split, images in zip(("train", "test"), sets, strict=True):

        def compute(images: ImageSet = images) -> tuple[Tensor, Tensor]:
            assert images.labels is not None
            features, kept = embed(subject.backbone, images, config, device, batch=command.batch)
            return features, torch.from_numpy(images.labels)[kept]

        key: dict[str, object] = {
            "checkpoint": subject.key,
            "data": images.digest,
            "size": config.augment.size,
            "interpolation": config.augment.interpolation,
            "mean": config.augment.mean,
            "std": config.augment.std,
            "split": split,
            "precision": config.precision,
            "device": device.type,
        }
        file = subject.folder / f"{subject.name}-{split}.safetensors"
        # what was fine-tuned just now is no checkpoint's, and is not kept
        found.append(
            compute()
            if command.finetune
            else cached_features(file, key, compute, whole=len(images))
        )
    return found[0], found[1]


def _place_for(embedded: Sets, device: torch.device) -> torch.device:
    """Where probe and kNN run: with the backbone, if the embeddings fit there a few times over."""
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
    subject: Subject, test: ImageSet, command: EvaluateCommand, device: torch.device
) -> Tensor | None:
    """Eigenvalues of the test images' projections, where there is a projector for them."""
    if subject.projector is None or command.finetune:
        return None
    whole = nn.Sequential(subject.backbone, subject.projector.to(device))
    projections, _ = embed(whole, test, subject.config, device, batch=command.batch)
    return eigenvalues(projections)


def _write_features(file: Path, embedded: Sets) -> None:
    tensors = {
        f"{split}_{what}": tensor.cpu().contiguous()
        for split, pair in zip(("train", "test"), embedded, strict=True)
        for what, tensor in zip(("features", "labels"), pair, strict=True)
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".npz":
            partial = file.with_name(f"{atomic_files.TEMPORARY}{file.name}")
            arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
            np.savez(partial, **arrays)
            partial.replace(file)
        else:
            atomic_files.replace(file, save(tensors))
    except OSError as error:
        raise CannotCreate(
            f"--features-out {file} cannot be written ({error.strerror}): name a file that can"
        ) from error
    print0(f"embeddings and labels of both sets are in {file}")


def _report(result: Result, spectrum: Tensor | None, subject: Subject) -> None:
    """Print the result and save it, with the eigenvalues of the test images' projections."""
    file = subject.folder / f"{subject.name}-{result.label}.json"
    plain: dict[str, object] = asdict(result)
    lines = [
        f"{result.test_images} test images of {result.classes} classes, protocol {result.protocol}",
        f"  linear probe    top-1 {result.top1:6.2f} %   top-5 {result.top5:6.2f} %"
        + result.chosen_in_words,
        f"  kNN             top-1 {result.knn_top1:6.2f} %   top-5 {result.knn_top5:6.2f} %",
    ]
    if spectrum is not None:
        directions = float(effective_rank(spectrum))
        plain |= {"effective_rank": directions, "eigenvalues": spectrum.flip(0).tolist()}
        lines += [f"  effective rank of the projections   {directions:.1f}"]
    atomic_files.replace(file, json.dumps(plain, indent=1) + "\n")
    print0("\n".join([*lines, f"saved in {file}"]))
