"""The data sets, by name. Each becomes an `ImageSet`."""

from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image

from rdm_fast.config import DataConfig, DataName
from rdm_fast.data.images.arrays import load_arrays
from rdm_fast.data.images.decode import reason
from rdm_fast.data.images.folder import listing, load_folder, require_folder
from rdm_fast.data.images.huggingface import load_hf
from rdm_fast.data.images.sets import ImageSet, PixelImages, Pixels, Subset
from rdm_fast.data.images.shards import load_shards
from rdm_fast.errors import DataError, InputMissing, Unavailable
from rdm_fast.runtime.distributed import all_reduce_max, rank, world_size

Split = Literal["train", "test"]

DIGITS_SIDE = 16
DIGITS_TRAIN = 1400
DIGITS_MAX = 16  # scikit-learn's digits count pixels of a 4 x 4 block


def load(config: DataConfig, split: Split, bad_files: Path | None = None) -> ImageSet:
    """The train or test images of a data set; of train, the share data.fraction.

    Args:
        config: which data set, and what to do about image files that cannot be used.
        split: train or test.
        bad_files: the table that lists such files; None for none.

    Raises:
        InputMissing: they are not in --data.root; the message shows what is there.
        DataError: they cannot be used; the message names the first bad file.
        Unavailable: they could not be fetched, or a library that reads them is missing.
    """
    images = _load(config, split, bad_files)
    return images if config.fraction == 1 or split == "test" else share_of(images, config.fraction)


def _load(config: DataConfig, split: Split, bad_files: Path | None) -> ImageSet:
    root = Path(config.root).expanduser()
    if config.name == "digits":
        return load_digits(split)
    if config.name == "folder":
        return load_folder(root, split, config, bad_files)
    if config.name == "webdataset":
        return load_shards(root, split, config, bad_files)
    if config.name == "arrays":
        return load_arrays(root, split, config.white_level)
    if config.name == "hf":
        return load_hf(config, split, bad_files)
    return load_torchvision(config.name, root, split, config.download)


def share_of(images: ImageSet, fraction: float) -> Subset:
    """A fixed random share of the images, in their order, and as nearly as can be of each class.

    A smaller share is part of a larger one. Images without a label are a class of their own.
    """
    n = len(images)
    classes = np.zeros(n, np.int64) if images.labels is None else images.labels
    shuffled = np.random.default_rng(0).permutation(n)
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    _, start, size = np.unique(classes[by_class], return_index=True, return_counts=True)
    place = (np.arange(n) - np.repeat(start, size) + 0.5) / np.repeat(size, size)  # in its class
    chosen = by_class[np.argsort(place, kind="stable")[: max(1, round(fraction * n))]]
    return Subset(images, np.sort(chosen))


def load_digits(split: Split) -> PixelImages:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, enlarged to 16 x 16 (bilinear), grey.

    A fixed random 1,400 are for training, the other 397 for testing.
    """
    from sklearn.datasets import load_digits as bundled  # slow to import

    digits = bundled()
    levels = np.rint(digits.images * (255 / DIGITS_MAX)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(levels))
    chosen = order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]
    # All as one tall image, a second edge around each: what is a border of its own stays one.
    tall = Image.fromarray(np.pad(levels[chosen], ((0, 0), (1, 1), (0, 0)), "edge").reshape(-1, 8))
    enlarged = tall.resize((DIGITS_SIDE, 2 * tall.height), Image.Resampling.BILINEAR)
    pixels = np.asarray(enlarged).reshape(len(chosen), -1, DIGITS_SIDE, 1)[:, 2:-2]
    labels = digits.target[chosen].astype(np.int64)
    return PixelImages(pixels.copy(), labels, [str(name) for name in digits.target_names])


TORCHVISION: dict[DataName, tuple[str, str, str]] = {
    "cifar10": ("CIFAR-10", "CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR-100", "CIFAR100", "cifar-100-python"),
    "stl10": ("STL-10", "STL10", "stl10_binary"),
    "fashion_mnist": ("Fashion-MNIST", "FashionMNIST", "FashionMNIST/raw"),
}
"""Title, torchvision's class, and its folder under the root."""


def load_torchvision(name: DataName, root: Path, split: Split, download: bool) -> PixelImages:
    """A data set in torchvision's layout under `root`, fetched first if `download`.

    STL-10's training images include its 100,000 unlabeled ones, with label -1.
    """
    from torchvision import datasets  # slow to import

    title, class_name, folder = TORCHVISION[name]
    part = {"split": "train+unlabeled" if split == "train" else "test"}
    arguments: dict[str, Any] = part if name == "stl10" else {"train": split == "train"}
    if not download:
        require_folder(root)
    try:
        found: Any = getattr(datasets, class_name)(str(root), **arguments, download=download)
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        if download:
            raise Unavailable(
                f"--data.download could not fetch {title} into {root} ({reason(error)}): "
                "fetch it elsewhere and copy it there"
            ) from error
        if not (root / folder).is_dir():
            raise InputMissing(
                f"--data.root {root} has no {title}: looked for {folder}, found "
                f"{listing(root)}; add --data.download to fetch it"
            ) from error
        raise DataError(
            f"{root / folder} is not a whole {title} ({reason(error)}): "
            "remove it and add --data.download"
        ) from error
    data = np.asarray(found.data)
    if name == "stl10":
        data = data.transpose(0, 2, 3, 1)  # torchvision keeps it [N, C, H, W]
    labels = found.labels if name == "stl10" else found.targets
    pixels = cast(Pixels, data if data.ndim == 4 else data[..., None])
    return PixelImages(pixels, np.asarray(labels, dtype=np.int64), list(found.classes))


def require_same_images(images: ImageSet, config: DataConfig, device: torch.device) -> None:
    """Refuse ranks that see different files: they would not share one order.

    Raises:
        DataError: any two differ; raised on every rank.
    """
    if world_size() == 1:
        return
    mine = int(images.digest[:15], 16)
    if all_reduce_max(int(all_reduce_max(mine, device) != mine), device):
        raise DataError(
            f"the ranks do not see the same images in --data.root {config.root} "
            f"(rank {rank()} has {len(images)}): is it the same on every machine? if so, "
            "a file could not be read for a moment; run the same command again"
        )
