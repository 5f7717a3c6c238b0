"""Choose and build the loader that a configuration names."""

import contextlib
from typing import TypedDict

import torch

from rdm_fast.config import Config
from rdm_fast.data.images.sets import ImageSet, require_channels
from rdm_fast.data.loaders.batch import Loader
from rdm_fast.data.loaders.dali_loader import DaliLoader
from rdm_fast.data.loaders.resident import ResidentLoader
from rdm_fast.data.loaders.torch_loader import TorchLoader
from rdm_fast.errors import Unavailable, UsageError


def build_loader(
    config: Config, images: ImageSet, *, rank: int, world_size: int, device: torch.device
) -> Loader:
    """The loader that `data.loader` names.

    auto takes resident for decoded images of one size, else on a GPU DALI if it works here, else
    torch, which on a CPU is the faster of the two.

    Raises:
        UsageError: the images do not fit the configuration: too few for a step, another number
            of channels, or not resident though data.loader says so.
        Unavailable: data.loader says dali, and DALI is not installed or does not work here.
    """
    name, batch = config.data.name, config.optim.global_batch
    require_channels(images, config.augment, f"--data.name {name}")
    if len(images) < batch:
        raise UsageError(
            f"--optim.global-batch {batch} is more than the {len(images)} training images of "
            f"{name}: give {len(images)} or less"
        )
    config.optim.local_batch(world_size)  # refuses a batch that does not divide
    place = _Place(rank=rank, world_size=world_size, device=device)
    match config.data.loader:
        case "auto":
            if images.pixels is not None:
                return ResidentLoader(config, images, images.pixels, **place)
            if device.type == "cuda":
                with contextlib.suppress(Unavailable):
                    return DaliLoader(config, images, **place)
            return TorchLoader(config, images, **place)
        case "dali":
            return DaliLoader(config, images, **place)
        case "torch":
            return TorchLoader(config, images, **place)
        case "resident":
            if images.pixels is None:
                raise UsageError(
                    f"--data.loader resident needs small images of one size, and those of {name} "
                    "are decoded one by one: use --data.loader torch"
                )
            return ResidentLoader(config, images, images.pixels, **place)


class _Place(TypedDict):
    rank: int
    world_size: int
    device: torch.device
