"""What a recipe shows to the network: `python -m rdm_fast.tools.preview RECIPE [--out FILE]`.

A contact sheet: a row an image, first as it is in the data set, then its views as each loader that
works here makes them. They are the first images of the recipe's first epoch, drawn as in
training, so a row's views differ from loader to loader by rounding only.
"""

import contextlib
import difflib
import io
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw

from rdm_fast.config import AugmentConfig, Config, DataConfig
from rdm_fast.config.recipes import DEFAULT, RECIPES, recipe
from rdm_fast.data.images.datasets import load
from rdm_fast.data.images.sets import ImageSet, Pixels
from rdm_fast.data.loaders.batch import Batch
from rdm_fast.data.loaders.build import build_loader
from rdm_fast.errors import CannotCreate, Unavailable, UsageError, UserError
from rdm_fast.runtime.distributed import choose_device

LOADERS: tuple[Literal["torch", "resident", "dali"], ...] = ("torch", "resident", "dali")
"""The first is what the others are compared with."""
CELL = 96  # pixels of a picture, at least
GAP = 8
TITLE = 16  # pixels of a line of text


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What to show. Data and augmentation have the flags of train.py."""

    data: DataConfig
    augment: AugmentConfig
    seed: int = 5
    images: int = 8
    """Rows of the sheet."""
    device: str = "auto"
    """auto, cpu or cuda: where the views are made."""
    out: str = "preview.png"
    """File to be written."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Write the sheet that argv asks for, and exit."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        preview(parse(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    raise SystemExit(0)


def parse(words: Sequence[str]) -> tuple[Config, Preview]:
    """The recipe that the first word names (or the default one), and what the flags change.

    Raises:
        UsageError: no recipe has that name, or nothing can be shown with these numbers.
    """
    named = bool(words) and not words[0].startswith("-")
    name = words[0] if named else DEFAULT
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else "train.py --help lists all"
        raise UsageError(f"unknown recipe {name}: {hint}")
    config = recipe(name)
    default = Preview(data=config.data, augment=config.augment, seed=config.seed)
    asked = _parse_flags(words[1:] if named else words, default)
    try:
        if asked.images < 2:
            raise UsageError(f"--images {asked.images}: give 2 or more")
        batch = replace(config.optim, global_batch=asked.images, accumulate=1)
        config = replace(
            config, data=asked.data, augment=asked.augment, seed=asked.seed, optim=batch
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    return config, asked


def _parse_flags(words: Sequence[str], default: Preview) -> Preview:
    """tyro's result; what it tells in a box becomes one sentence.

    Raises:
        UsageError: a flag or value that is none.
    """
    if {"-h", "--help"} & {*words}:
        return tyro.cli(Preview, args=["--help"], prog="preview [RECIPE]", default=default)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box), contextlib.redirect_stdout(box):
            return tyro.cli(Preview, args=words, prog="preview [RECIPE]", default=default)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except SystemExit:
        raise UsageError(_sentence(box.getvalue())) from None


def _sentence(printed: str) -> str:
    """Of what tyro prints, a title and paragraphs between rules: the first paragraph, and the flag
    that it thinks was meant."""
    paragraphs = re.split(r"^\s*-{3,}\s*$", printed, flags=re.MULTILINE)
    told = " ".join(paragraphs[min(1, len(paragraphs) - 1)].split()).removeprefix("Error parsing ")
    near = re.search(r"Perhaps you meant:\s+(--[\w.-]+)", printed)
    way_out = f": did you mean {near[1]}?" if near else " (--help lists all)"
    return told.rstrip(".") + way_out


def preview(asked: tuple[Config, Preview]) -> None:
    """Write the sheet, and tell how far the loaders are apart.

    Raises:
        UserError: the images cannot be read, or the sheet not be written.
    """
    config, flags = asked
    device = choose_device(flags.device)
    images = load(config.data, "train")
    batches = first_batches(config, images, device)
    views = {name: levels_of(batch, config.augment) for name, batch in batches.items()}
    expected = np.concatenate([view.ravel() for view in views[LOADERS[0]]]).astype(float)
    for name, made in list(views.items())[1:]:
        off = np.abs(np.concatenate([view.ravel() for view in made]) - expected)
        print(f"{name}: {off.mean():.2f} of 255 levels from {LOADERS[0]}, on average")
    chosen = batches[LOADERS[0]].indices.tolist()
    sheet = contact_sheet([images.read(i) for i in chosen], views)
    try:
        sheet.save(flags.out, optimize=True)
    except (OSError, ValueError) as error:
        raise CannotCreate(f"--out {flags.out} cannot be written ({error})") from error
    print(f"{flags.out}: {len(chosen)} images of {config.data.name}, {', '.join(views)}")


def first_batches(config: Config, images: ImageSet, device: torch.device) -> dict[str, Batch]:
    """The first batch of epoch 0 from each loader that works here with these images."""
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
            print(f"no {name}: {error}")
            continue
        batches[name] = next(iter(loader.epoch(0)))
    return batches


def levels_of(batch: Batch, augment: AugmentConfig) -> list[Pixels]:
    """All views before normalization, each [b, S, S, C]."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (augment.mean, augment.std))
    levels = [(255 * (view.float().cpu() * std + mean)).round() for view in batch.views]
    return [view.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy() for view in levels]


def contact_sheet(originals: list[Pixels], views: dict[str, list[Pixels]]) -> Image.Image:
    """The sheet: a row an image; its original, then all views for each loader.

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
    """An original, as large as fits in a cell."""
    image = as_image(pixels)
    scale = cell / max(image.size)
    sides = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(sides, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)


def enlarged(view: Pixels, cell: int) -> Image.Image:
    """A view, its pixels shown as squares."""
    return as_image(view).resize((cell, cell), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()
