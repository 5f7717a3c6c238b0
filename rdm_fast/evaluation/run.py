"""Evaluating the checkpoint of a run: what eval_linear.py does."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rdm_fast import checkpoint, durable
from rdm_fast.config import Config
from rdm_fast.data import ImageSet, load
from rdm_fast.data.subset import Subset
from rdm_fast.distributed import print0, rank
from rdm_fast.errors import DataError, InputMissing
from rdm_fast.evaluation.evaluate import Result, evaluate
from rdm_fast.evaluation.features import cached_features, embed
from rdm_fast.evaluation.protocols import find_protocol
from rdm_fast.methods import Method, build_method
from rdm_fast.run_folder import read_config
from rdm_fast.spectrum import effective_rank, eigenvalues

FOLDER = "evaluation"
"""Inside the run folder: cached embeddings, and one JSON file of results a protocol and step."""


def find_checkpoint(path: Path) -> Path:
    """The step folder that a run folder's newest sound checkpoint is, or `path` itself.

    Raises:
        InputMissing: there is no checkpoint there.
    """
    if not path.exists():
        raise InputMissing(f"{path} does not exist: give a run folder, or a step folder inside it")
    if (path / "manifest.json").exists() or path.name.startswith("step-"):
        return path
    if not (path / "config.yaml").exists():
        raise InputMissing(f"{path} is neither a run folder nor a checkpoint of one")
    found = checkpoint.newest(path / "checkpoints", lambda text: print0(f"warning: {text}"))
    if found is None:
        raise InputMissing(f"the run in {path} has no sound checkpoint: train it first")
    return found


def evaluate_checkpoint(
    path: Path,
    protocol: str,
    *,
    device: torch.device,
    data_root: str | None = None,
    batch: int = 256,
    seed: int = 0,
) -> Result | None:
    """Embed all labelled images once, probe the embeddings, print and save the result.

    Args:
        path: a step folder inside a run folder.
        protocol: how to probe, as `find_protocol` takes it.
        device: where the backbone runs.
        data_root: where the data set is, if it has moved.
        batch: images of one forward pass on each rank.
        seed: of the probe.

    Returns:
        The result on rank zero, None on the others.

    Raises:
        InputMissing, DataError: the data, the checkpoint or their labels cannot be used.
    """
    run = path.parent.parent
    config = read_config(run)
    if data_root is not None:
        config = replace(config, data=replace(config.data, root=data_root))
    chosen = find_protocol(protocol, config.data.name)
    method = _load_method(path, config).to(device)
    train, test = _labelled(load(config.data, "train")), _labelled(load(config.data, "test"))
    embedded = [
        _embed(method.backbone, images, path, split, config, device, batch)
        for split, images in (("train", train), ("test", test))
    ]
    whole = nn.Sequential(method.backbone, method.projector)
    projections, _ = embed(whole, test, config, device, batch=batch)
    if rank() != 0:
        return None
    (train_features, train_labels), (test_features, test_labels) = embedded
    result = evaluate(
        train_features,
        train_labels,
        test_features,
        test_labels,
        chosen,
        classes=len(train.classes),
        seed=seed,
    )
    _report(result, eigenvalues(projections), path, run)
    return result


def _load_method(path: Path, config: Config) -> Method:
    snapshot = checkpoint.load(path)
    method = build_method(config)
    what = f"checkpoint {path} (read as a {config.model.backbone} with a {config.method} head)"
    count = checkpoint.load_strict(method, snapshot.model, what)
    print0(f"{path}: {count} of {count} tensors matched, 0 missing, step {snapshot.step}")
    return method.eval()


def _labelled(images: ImageSet) -> ImageSet:
    """The images with a label, which a probe needs."""
    if images.labels is None or not (images.labels >= 0).any():
        raise DataError(
            "a linear probe needs labels and these images have none: "
            "arrange them as <root>/train/<class>/ and <root>/test/<class>/"
        )
    with_label = np.flatnonzero(images.labels >= 0)
    return images if len(with_label) == len(images) else Subset(images, with_label)


def _embed(
    backbone: nn.Module,
    images: ImageSet,
    path: Path,
    split: str,
    config: Config,
    device: torch.device,
    batch: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and labels of a split, from the cache if it was made for the same everything."""

    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        features, kept = embed(backbone, images, config, device, batch=batch)
        assert images.labels is not None
        return features, torch.from_numpy(images.labels)[kept]

    key: dict[str, object] = {
        "checkpoint": (path / "manifest.json").read_text(encoding="utf-8"),
        "data": images.digest,
        "size": config.augment.size,
        "interpolation": config.augment.interpolation,
        "mean": config.augment.mean,
        "std": config.augment.std,
        "split": split,
        "precision": config.precision,
        "device": device.type,
    }
    file = path.parent.parent / FOLDER / f"{path.name}-{split}.safetensors"
    return cached_features(file, key, compute, whole=len(images))


def _report(result: Result, spectrum: torch.Tensor, path: Path, run: Path) -> None:
    """Print the result and save it, with the eigenvalues of the test images' projections."""
    directions = float(effective_rank(spectrum))
    file = run / FOLDER / f"{path.name}-{result.protocol}.json"
    descending = spectrum.flip(0).tolist()
    plain = {**asdict(result), "effective_rank": directions, "eigenvalues": descending}
    durable.replace(file, json.dumps(plain, indent=1) + "\n")
    lines = [
        f"{result.test_images} test images of {result.classes} classes, protocol {result.protocol}",
        f"  linear probe    top-1 {result.top1:6.2f} %   top-5 {result.top5:6.2f} %",
        f"  kNN             top-1 {result.knn_top1:6.2f} %   top-5 {result.knn_top5:6.2f} %",
        f"  effective rank of the projections   {directions:.1f}",
        f"saved in {file}",
    ]
    print0("\n".join(lines))
