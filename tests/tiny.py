"""A run small enough to be repeated many times: digits, a narrow ResNet-8, four steps an epoch."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rdm_fast.config import Config, LogConfig
from rdm_fast.config.recipes import RECIPES
from rdm_fast.data import Batch
from rdm_fast.runtime.distributed import rank, world_size

METHODS = [
    "digits_simsiam",
    "digits_byol",
    "digits_dino",
    "digits_swav",
    "digits_symsimsiam",
    "digits_rdm_simsiam",
    "digits_rdm_byol",
]


def tiny(name: str = "digits_rdm_simsiam", size: int = 8, **optim: object) -> Config:
    """The recipe with a model of a few thousand weights, small views, two epochs of four steps."""
    config = RECIPES[name]()
    sizes = {"width": 4, "projector_hidden": 16, "projector_dim": 24, "predictor_hidden": 8}
    prototypes = config.method in ("dino", "swav")
    settings: dict[str, object] = {"epochs": 2, "global_batch": 336, "warmup_epochs": 1.0}
    return replace(
        config,
        augment=replace(config.augment, size=size),
        model=replace(config.model, backbone="resnet8", stem="cifar", projector_layers=3, **sizes),
        prototypes=replace(config.prototypes, count=20) if prototypes else config.prototypes,
        optim=replace(config.optim, **(settings | optim)),
        log=LogConfig(every=2, spectrum_every=3, knn_every=0, save_every=2),
    )


def command(config_flags: str = "", recipe: str = "digits_rdm_simsiam") -> list[str]:
    """The same run as arguments of train.py."""
    flags = (
        "--model.width 4 --model.projector-hidden 16 --model.projector-dim 24 "
        "--model.predictor-hidden 8 --augment.size 8 --optim.epochs 2 --optim.warmup-epochs 1 "
        "--optim.global-batch 336 --log.every 2 --log.knn-every 0 --log.save-every 2 "
    )
    return [recipe, *flags.split(), *config_flags.split()]


def with_small_views(name: str, n: int = 2, **optim: object) -> Config:
    """The same with n small views of 8 pixels beside two of 16."""
    config = tiny(name, size=16, **optim)
    return replace(config, augment=replace(config.augment, small_views=n, small_size=8))


def batch(rows: int, seed: int = 0, size: int = 8, small: int = 0) -> Batch:
    """Two views of noise that share most of it, and small ones of its corners."""
    generator = torch.Generator().manual_seed(seed)
    image, *noise = torch.randn(3, rows, 1, size, size, generator=generator)
    return Batch(
        view1=image + 0.3 * noise[0],
        view2=image + 0.3 * noise[1],
        labels=torch.zeros(rows, dtype=torch.int64),
        indices=torch.from_numpy(np.arange(rows)),
        small=tuple(image[:, :, i : i + size // 2, : size // 2] for i in range(small)),
    )


def own_rows(whole: Batch) -> Batch:
    """Those of this rank, in rank order."""
    share = len(whole.labels) // world_size()
    return rows_of(whole, slice(rank() * share, (rank() + 1) * share))


def rows_of(whole: Batch, rows: Tensor | slice) -> Batch:
    """Some rows of a batch, as a rank has them."""
    return Batch(
        view1=whole.view1[rows],
        view2=whole.view2[rows],
        labels=whole.labels[rows],
        indices=whole.indices[rows],
        small=tuple(view[rows] for view in whole.small),
    )
