"""`rdm preview`: a contact sheet of the views that a recipe's network trains on.

Each row is an image, first as it is in the data set, then its views as each loader that works here
makes them. The images are the first of the recipe's first epoch, and all loaders draw the same
views, so the views in a row differ from loader to loader by rounding only.
"""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw

from rdm_fast.config import AugmentConfig, Config
from rdm_fast.data.images.datasets import load
from rdm_fast.data.images.sets import ImageSet, Pixels
from rdm_fast.data.loaders.batch import Batch
from rdm_fast.data.loaders.build import build_loader
from rdm_fast.errors import CannotCreate, Unavailable, UsageError, message_of
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.distributed import choose_device
from rdm_fast.runtime.printing import print_line

LOADERS: tuple[Literal["torch", "resident", "dali"], ...] = ("torch", "resident", "dali")
"""The first is the one that the others are compared with."""
CELL = 96  # pixels of a picture, at least
GAP = 8
TITLE = 16  # pixels of a line of text


def preview(config: Config, *, images: int, path: Path) -> None:
    """Write the sheet, and print how far the loaders differ.

    Args:
        config: the run whose views are shown.
        images: rows of the sheet, at most.
        path: picture file to write.

    Raises:
        UserError: the images cannot be read, or the sheet cannot be written.
    """
    source = load(config.data, "train")
    rows = min(images, len(source))
    config = replace(config, optim=replace(config.optim, global_batch=rows, accumulate=1))
    batches = first_batches(config, source, choose_device(config.device))
    views = {name: levels_of(batch, config.augment) for name, batch in batches.items()}
    expected = np.concatenate([view.ravel() for view in views[LOADERS[0]]]).astype(float)
    for name, made in list(views.items())[1:]:
        off = np.abs(np.concatenate([view.ravel() for view in made]) - expected)
        print_line(f"{name}: {off.mean():.2f} of 255 levels from {LOADERS[0]}, on average")
    chosen = batches[LOADERS[0]].indices.tolist()
    sheet = contact_sheet([source.read(i) for i in chosen], views)
    try:
        picture = io.BytesIO()
        sheet.save(picture, Image.registered_extensions().get(path.suffix.lower()), optimize=True)
        atomic_files.replace(path, picture.getvalue())
    except (OSError, ValueError) as error:
        raise CannotCreate(f"--sheet {path} cannot be written ({message_of(error)})") from error
    print_line(f"{path}: {len(chosen)} images of {config.data.name}, {', '.join(views)}")


def first_batches(config: Config, images: ImageSet, device: torch.device) -> dict[str, Batch]:
    """The first batch of epoch 0 from each loader that supports these images here."""
    batches: dict[str, Batch] = {}
    for name in LOADERS:
        data = replace(config.data, loader=name)
        try:
            loader = build_loader(
                replace(config, data=data), images, rank=0, world_size=1, device=device
            )
        except (Unavailable, UsageError) as error:
            if name == LOADERS[0]:
                raise
            print_line(f"no {name}: {error}")
            continue
        batches[name] = next(iter(loader.epoch(0)))
    return batches


def levels_of(batch: Batch, augment: AugmentConfig) -> list[Pixels]:
    """All views before normalization, each [b, S, S, C]."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (augment.mean, augment.std))
    levels = [(255 * (view.float().cpu() * std + mean)).round() for view in batch.views]
    return [view.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy() for view in levels]


def contact_sheet(originals: list[Pixels], views: dict[str, list[Pixels]]) -> Image.Image:
    """One row per image: its original, then all views from each loader.

    Args:
        originals: [H, W, C] each, of any size.
        views: [n, S, S, C] each, by the loader that made them.
    """
    S = next(iter(views.values()))[0].shape[1]
    cell = S * math.ceil(CELL / S)
    columns = [("original", [picture(image, cell) for image in originals])]
    for name, made in views.items():
        for k, view in enumerate(made):
            side = cell * view.shape[1] // S
            columns.append((name if k == 0 else "", [enlarged(image, side) for image in view]))
    width, height = len(columns) * (cell + GAP) + GAP, len(originals) * (cell + GAP) + GAP + TITLE
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(columns):
        left = GAP + column * (cell + GAP)
        pen.text((left, GAP // 2), title, fill="black")
        for row, image in enumerate(pictures):
            top = TITLE + GAP + row * (cell + GAP)
            sheet.paste(image, (left + (cell - image.width) // 2, top + (cell - image.height) // 2))
    return sheet


def as_image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")


def picture(pixels: Pixels, cell: int) -> Image.Image:
    """An original, scaled to fit a cell."""
    image = as_image(pixels)
    scale = cell / max(image.size)
    sides = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(sides, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)


def enlarged(view: Pixels, cell: int) -> Image.Image:
    """A view, enlarged without interpolation."""
    return as_image(view).resize((cell, cell), Image.Resampling.NEAREST)
