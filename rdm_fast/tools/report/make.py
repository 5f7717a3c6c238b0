"""From run folders to the page and its figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from rdm_fast.errors import CannotCreate, UserError
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.distributed import choose_device, print0
from rdm_fast.tools.report import curves, snapshots, style
from rdm_fast.tools.report.layout import FEWEST, flatten, require_umap
from rdm_fast.tools.report.measure import Embeddings, Spectra, measure, recorded
from rdm_fast.tools.report.options import ReportCommand
from rdm_fast.tools.report.page import Section, render
from rdm_fast.tools.report.read import Run, find_runs, read_runs, sentence
from rdm_fast.tools.report.style import Picture

FIGURES = "figures"
"""Folder beside the page."""
METHODS = {"tsne": "t-SNE", "umap": "UMAP"}


def make_report(command: ReportCommand) -> Path:
    """Read, measure, draw and write; what cannot be read is told in the page and on the console.

    Returns:
        The page.

    Raises:
        UserError: a name is no run folder, a library is missing, or the page cannot be written.
    """
    style.require_matplotlib("rdm report")
    if command.map == "umap":
        require_umap()
    device = choose_device(command.device)
    paths = find_runs(command.runs)
    page = _page(command.out, paths)
    runs = read_runs(paths)
    measured = _measure(runs, command, device)
    with style.applied():
        sections = [*_over_time(runs), *_measured(runs, measured, command)]
    for run in runs:
        for note in run.notes:
            print0(f"warning: {run.label}: {note}")
    _write(page, render(runs, sections), sections)
    return page


def _page(out: str | None, paths: Sequence[Path]) -> Path:
    if out is not None:
        return Path(out)
    return (paths[0] if len(paths) == 1 else Path()) / "report.html"


@dataclass
class Measured:
    """Of the runs for which there are any: spectra in the order of steps, and embeddings."""

    spectra: list[tuple[Run, list[Spectra]]] = field(default_factory=list)
    embeddings: list[tuple[Run, Embeddings]] = field(default_factory=list)


def _measure(runs: Sequence[Run], command: ReportCommand, device: torch.device) -> Measured:
    """What training recorded, else what a checkpoint shows; what is lacking becomes a note."""
    measured = Measured()
    images = 0 if command.map == "none" else command.images
    for run in runs:
        try:
            spectra = recorded(run)
        except UserError as error:
            spectra = []
            run.notes.append(sentence(error))
        if not spectra or images:
            try:
                found = measure(
                    run, device, data_root=command.data_root, images=images, spectra=not spectra
                )
            except UserError as error:
                lacking = "No map" if spectra else "No spectra and no map"
                run.notes.append(sentence(f"{lacking}: {error}"))
            else:
                if found.spectra:
                    spectra = [found.spectra]
                if found.embeddings:
                    measured.embeddings.append((run, found.embeddings))
        if spectra:
            measured.spectra.append((run, spectra))
    return measured


# ---- sections --------------------------------------------------------------------------------


def _over_time(runs: Sequence[Run]) -> list[Section]:
    names = ("rank-difference", "effective-rank", "loss", "accuracy", "throughput")
    titles = ("Rank difference", "Effective rank", "Loss", "Accuracy", "Throughput")
    drawn = [draw(runs) for draw in curves.OVER_TIME]
    return [Section(*each) for each in zip(names, titles, drawn, strict=True)]


def _measured(runs: Sequence[Run], found: Measured, command: ReportCommand) -> list[Section]:
    absent = "No spectra were recorded, and no checkpoint could be used."
    spectra = snapshots.spectra(found.spectra) if found.spectra else absent
    response = snapshots.responses(runs, found.spectra) if found.spectra else absent
    return [
        Section("spectra", "Eigenvalue spectra", spectra),
        Section("response", "Filter response", response),
        Section("map", "Map of embeddings", _map(found.embeddings, command)),
    ]


def _map(found: Sequence[tuple[Run, Embeddings]], command: ReportCommand) -> Picture | str:
    if command.map == "none":
        return "Not asked for (--map none)."
    maps = []
    for run, embeddings in found:
        rows = embeddings.rows
        if len(rows) < FEWEST:
            run.notes.append(f"No map: it has {len(rows)} test images.")
        elif not np.isfinite(rows).all() or np.ptp(rows, axis=0).max() == 0:
            run.notes.append("No map: its embeddings are not finite, or all the same.")
        else:
            maps.append((run, flatten(rows, command.map, command.seed), embeddings))
    if not maps:
        return "There are no embeddings that could be drawn."
    return snapshots.embedding_map(maps, METHODS[command.map])


# ---- files -----------------------------------------------------------------------------------


def _write(page: Path, html: str, sections: Sequence[Section]) -> None:
    """The page, and its figures as figures/<page>-<name>.png beside it."""
    folder = page.parent / FIGURES
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for section in sections:
            if isinstance(section.figure, Picture):
                atomic_files.replace(folder / f"{page.stem}-{section.name}.png", section.figure.png)
        atomic_files.replace(page, html)
    except OSError as error:
        raise CannotCreate(
            f"{page} cannot be written ({error.strerror}): give --out a name in a folder that can"
        ) from error
