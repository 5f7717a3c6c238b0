"""Choose and build the loader that a configuration names."""

import contextlib

import torch

from rdm_fast.config import Config
from rdm_fast.data.images.sets import ImageSet, require_channels
from rdm_fast.data.loaders.batch import Loader
from rdm_fast.data.loaders.dali_loader import DaliLoader
from rdm_fast.data.loaders.resident import ResidentLoader
from rdm_fast.data.loaders.torch_loader import TorchLoader
from rdm_fast.errors import Unavailable, UsageError

LOADERS: dict[str, type[Loader]] = {k.name: k for k in (DaliLoader, ResidentLoader, TorchLoader)}


def build_loader(
    config: Config, images: ImageSet, *, rank: int, world_size: int, device: torch.device
) -> Loader:
    """The loader that `data.loader` names.

    auto takes resident for decoded images of one size, else on a GPU DALI if it works here, else
    torch, which on a CPU is the faster of the two.

    Raises:
        UsageError: the images do not fit the configuration: too few for a step, another number
            of channels, or not decoded though data.loader is resident.
        Unavailable: data.loader is dali, and DALI is not installed or does not work here.
    """
    name, batch = config.data.name, config.optim.global_batch
    require_channels(images, config.augment, f"--data.name {name}")
    if len(images) < batch:
        raise UsageError(
            f"--optim.global-batch {batch} is more than the {len(images)} training images of "
            f"{name}: give {len(images)} or less"
        )
    config.optim.local_batch(world_size)  # refuses a batch that does not divide

    def build(kind: str) -> Loader:
        return LOADERS[kind](config, images, rank=rank, world_size=world_size, device=device)

    if config.data.loader != "auto":
        if config.data.loader == "resident" and images.pixels is None:
            raise UsageError(
                f"--data.loader resident needs small images of one size, and those of {name} "
                "are decoded one by one: use --data.loader torch"
            )
        return build(config.data.loader)
    if images.pixels is not None:
        return build("resident")
    if device.type == "cuda":
        with contextlib.suppress(Unavailable):
            return build("dali")
    return build("torch")
