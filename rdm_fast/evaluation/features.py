"""Embeddings of a frozen backbone: every image exactly once, on any number of ranks, cached.

Each rank writes the rows of its own images into a matrix of zeros, and the sum over ranks is the
whole matrix, whatever each rank's share. The summed counts prove that no image was missed or
embedded twice.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rdm_fast.config import Config, Precision
from rdm_fast.data import ImageSet, evaluation_batches
from rdm_fast.data.images.bad_files import UnreadableImages
from rdm_fast.data.loaders.workers import no_more_images
from rdm_fast.errors import DataError, WorkersFailed, message_of
from rdm_fast.models.batchnorm import recomputed_statistics
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.distributed import all_reduce_max, print0, rank, world_size
from rdm_fast.runtime.precision import autocast, float32_products

ROWS = 16_384
"""Rows in one collective, which bounds its device memory."""
Labeled = tuple[Tensor, Tensor]
"""Embeddings [N, d] float32 and labels [N] int64."""


def embed(
    backbone: nn.Module,
    images: ImageSet,
    config: Config,
    device: torch.device,
    *,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """Embeddings of all images that can be read, each rank embedding its share.

    Args:
        backbone: on the device, as for `extract`.
        images: shown as evaluation shows them.
        config: augment's normalization, precision, and data.max_bad, the share of images that may
            be unreadable; they are skipped, with a warning.
        device: where the backbone is.
        batch: images on a rank at a time.

    Returns:
        [m, d_emb] float32 on the CPU, and the indices of these images, [m] int64, ascending; the
        same on every rank.

    Raises:
        DataError: too many images cannot be read, or any while data.on_bad_image is stop.
    """
    unreadable = UnreadableImages(images, config.data, "evaluation leaves it out")
    batches = _batches(images, config, device, batch, unreadable)
    n = len(images)
    features = extract(
        backbone, batches, n, precision=config.precision, left_out=unreadable.indices
    )
    left_out = torch.zeros(n, dtype=torch.int64)
    left_out[list(unreadable.indices)] = 1
    kept = (_sum_over_ranks(left_out, _collective_device()) == 0).nonzero()[:, 0]
    if not len(kept):
        raise DataError(f"none of {n} images can be read, such as {images.name(0)}")
    return features if len(kept) == n else features[kept], kept


def _batches(
    images: ImageSet,
    config: Config,
    device: torch.device,
    batch: int,
    unreadable: UnreadableImages,
    whole: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    return evaluation_batches(
        images, config.augment, batch=batch, device=device, rank=rank(), world_size=world_size(),
        workers=config.data.workers if images.pixels is None else 0, limit=config.data.timeout,
        unreadable=unreadable, whole=whole,
    )  # fmt: skip


@torch.no_grad()
def recompute_statistics(
    network: nn.Module, images: ImageSet, config: Config, device: torch.device, *, batch: int
) -> bool:
    """Give the batch norms of a network the statistics of these images, in one pass over them.

    In the pass a batch norm normalizes by its batch (`recomputed_statistics`). Batches are the same
    on any number of ranks, and so is the result, but for rounding.

    Args:
        network: on the device, in evaluation mode; its running statistics change.
        images, config, device: as for `embed`.
        batch: images that are normalized together, at least two.

    Returns:
        Whether every image took part. One that cannot be read does not, nor one that has no other
        in its batch.

    Raises:
        DataError: too many images cannot be read.
    """
    unreadable = UnreadableImages(images, config.data, "the batch-norm statistics leave it out")
    seen = torch.zeros(1, dtype=torch.int64)
    with recomputed_statistics(network), _failing_together():
        for shown, _ in _batches(images, config, device, batch, unreadable, whole=True):
            if len(shown) > 1:
                with (
                    float32_products(config.precision, device),
                    autocast(config.precision, device),
                ):
                    network(shown)
                seen += len(shown)
    n = int(_sum_over_ranks(seen, _collective_device()))
    if not n:
        raise DataError(f"--bn recompute: no two of {len(images)} training images can be read")
    return n == len(images)


@torch.no_grad()
def extract(
    backbone: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    n: int,
    *,
    precision: Precision = "fp32",
    left_out: Collection[int] = (),
) -> Tensor:
    """Embeddings of a whole data set, from the backbone in evaluation mode.

    Args:
        backbone: images [b, C, S, S] -> embeddings [b, d_emb]. Its weights do not change, and its
            modules' training flags are restored.
        batches: this rank's share as (images, indices [b] int64), images on the backbone's
            device. The shares of all ranks together hold each of 0 .. n - 1 once, in any order.
        n: images in the data set.
        precision: arithmetic of the backbone, as in `rdm_fast.runtime.precision`.
        left_out: images of this rank's share that the batches skipped; read after them.

    Returns:
        [n, d_emb] float32 on the CPU, row i from image i, or zero if it was left out; the same on
        every rank. A rank needs memory for one such matrix.

    Raises:
        ValueError: an image was missing, came twice or is not one of the n.
        WorkersFailed: a rank can load no more images.
    """
    features, counts = torch.empty(0, 0), torch.zeros(n, dtype=torch.int64)
    was_training = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with _failing_together():
            for images, indices in batches:
                device = images.device
                with float32_products(precision, device), autocast(precision, device):
                    rows = backbone(images).float().cpu()  # [b, d_emb]; waits for the device
                indices = indices.cpu()
                _check_batch(rows, indices, n)
                if features.numel() == 0:
                    features = torch.zeros(n, rows.shape[1])
                features[indices] = rows
                counts += torch.bincount(indices, minlength=n)
        counts[list(left_out)] += 1
    finally:
        for module, training in was_training.items():
            module.training = training
    return gather_features(features, counts)


@contextmanager
def _failing_together() -> Iterator[None]:
    """Raise WorkersFailed on every rank if one does, for which the others would wait."""
    error: WorkersFailed | None = None
    try:
        yield
    except WorkersFailed as own:
        error = own
    if failed := all_reduce_max(rank() + 1 if error else 0, _collective_device()):
        raise error or no_more_images(failed - 1)


def _check_batch(rows: Tensor, indices: Tensor, n: int) -> None:
    if rows.ndim != 2 or indices.shape != rows.shape[:1]:
        raise ValueError(
            f"a batch of embeddings must be [b, d_emb] with [b] indices: got {tuple(rows.shape)} "
            f"and {tuple(indices.shape)}"
        )
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= n):
        raise ValueError(
            f"image indices run from {int(indices.min())} to {int(indices.max())}, but the data "
            f"set has {n} images"
        )


@torch.no_grad()
def gather_features(features: Tensor, counts: Tensor) -> Tensor:
    """All ranks' rows on every rank, after checking that each image was embedded once.

    Args:
        features: [n, d_emb] float32 on the CPU, zero in the rows of other ranks' images; a rank
            without images may pass [0, 0]. May be overwritten.
        counts: [n] int64, how often this rank embedded each image.

    Returns:
        [n, d_emb], complete and the same on every rank.

    Raises:
        ValueError: the counts of all ranks do not sum to 1 for each image.
    """
    device = _collective_device()
    counts = _sum_over_ranks(counts.clone(), device)
    if len(counts) == 0 or not bool((counts == 1).all()):
        missing, repeated = int((counts == 0).sum()), int((counts > 1).sum())
        raise ValueError(
            f"each of {len(counts)} images must be embedded exactly once: "
            f"{missing} were missing and {repeated} came more than once"
        )
    d_emb = all_reduce_max(features.shape[1], device)
    if features.numel() == 0:
        features = torch.zeros(len(counts), d_emb)
    return _sum_over_ranks(features, device)


def _collective_device() -> torch.device:
    """Where tensors must be for a collective."""
    nccl = world_size() > 1 and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _sum_over_ranks(tensor: Tensor, device: torch.device) -> Tensor:
    if world_size() > 1:
        for part in tensor.split(ROWS):
            sent = part.to(device)
            dist.all_reduce(sent)
            part.copy_(sent)
    return tensor


# ---- cache -------------------------------------------------------------------------------------


def cached_features(
    path: Path,
    key: dict[str, object],
    compute: Callable[[], Labeled],
    whole: int | None = None,
) -> Labeled:
    """Embeddings and labels from a file that was written for the same key, else computed.

    Args:
        path: a .safetensors file. It may be deleted at any time; a damaged file, or one with
            another key, is replaced.
        key: everything the embeddings depend on, as JSON values: digests of checkpoint and
            data, view size, split, precision.
        compute: returns features [n, d_emb] and labels [n]. Either all ranks call it or none, so
            it may contain collectives.
        whole: number of images. Fewer rows are not written, since a later run may read the rest.

    Returns:
        (features, labels) on the CPU, the same bits as `compute` returned.
    """
    wanted = json.dumps(key, sort_keys=True)
    found = _read(path, wanted)
    if all_reduce_max(int(found is None), _collective_device()) == 0 and found is not None:
        return found
    features, labels = compute()
    if rank() == 0 and (whole is None or len(labels) == whole):
        try:
            write_tensors(path, {"features": features, "labels": labels}, {"key": wanted})
        except (SafetensorError, OSError) as error:
            why = message_of(error)
            print0(f"{path} cannot be written ({why}): the next evaluation embeds again")
    return features, labels


def _read(path: Path, wanted: str) -> Labeled | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != wanted:
                return None
            return file.get_tensor("features"), file.get_tensor("labels")
    except (SafetensorError, OSError) as error:
        print0(f"{path} cannot be read ({message_of(error)}): embedding the images again")
        return None


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a .safetensors file atomically, in a folder that is created where it is missing.

    Raises:
        OSError, SafetensorError: it cannot be written; the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files.replacing(path) as partial:
        plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, partial, metadata)
