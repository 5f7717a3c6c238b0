"""The whole command: from run folders to the page and its figures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rdm_fast.errors import CannotCreate, UserError
from rdm_fast.run.folder import refuse_links
from rdm_fast.runtime import atomic_files
from rdm_fast.runtime.distributed import choose_device, print0
from rdm_fast.tools.report import curves, snapshots, style
from rdm_fast.tools.report.layout import FEWEST, flatten, require_umap
from rdm_fast.tools.report.measure import Embeddings, Spectra, measure, recorded
from rdm_fast.tools.report.options import ReportCommand
from rdm_fast.tools.report.page import render
from rdm_fast.tools.report.read import Run, find_runs, read_runs, sentence
from rdm_fast.tools.report.style import Picture

FIGURES = "figures"
"""Folder beside the page."""
METHODS = {"tsne": "t-SNE", "umap": "UMAP"}


def make_report(command: ReportCommand) -> Path:
    """Read, measure, draw and write; defects of a run are listed in the page and printed.

    Returns:
        The page.

    Raises:
        UserError: a name is no run folder, a library is missing, or the page cannot be written.
    """
    style.require_matplotlib("rdm report")
    if command.map == "umap":
        require_umap()
    paths = find_runs(command.runs)
    page = Path("report.html") if len(paths) > 1 else paths[0] / "report.html"
    page = page if command.out is None else Path(command.out)
    if page.parent in paths:
        refuse_links(page.parent)
    runs = read_runs(paths)
    spectra, embeddings = _measure(runs, command)
    with style.applied():
        pictures = [
            *filter(None, (draw(runs) for draw in curves.OVER_TIME)),
            snapshots.spectra(spectra),
            snapshots.responses(runs, spectra),
            _map(embeddings, command),
        ]
    for run in runs:
        for note in run.notes:
            print0(f"warning: {run.label}: {note}")
    _write(page, render(runs, pictures), pictures)
    return page


def _measure(
    runs: Sequence[Run], command: ReportCommand
) -> tuple[list[tuple[Run, list[Spectra]]], list[tuple[Run, Embeddings]]]:
    """Spectra in the order of steps, and embeddings, of the runs that have any.

    Spectra are those that training recorded, else those of a checkpoint. What is missing becomes
    a note of the run.
    """
    all_spectra, all_embeddings = [], []
    device = choose_device(command.device)
    images = 0 if command.map == "none" else command.images
    for run in runs:
        spectra: list[Spectra] = []
        try:
            spectra = recorded(run)
        except UserError as error:
            run.notes.append(sentence(error))
        if not spectra or images:
            try:
                fresh, embeddings = measure(
                    run, device, data_root=command.data_root, images=images, spectra=not spectra
                )
            except UserError as error:
                missing = "No map" if spectra else "No spectra and no map"
                run.notes.append(sentence(f"{missing}: {error}"))
            else:
                if fresh:
                    spectra = [fresh]
                if embeddings:
                    all_embeddings.append((run, embeddings))
        if spectra:
            all_spectra.append((run, spectra))
    return all_spectra, all_embeddings


def _map(found: Sequence[tuple[Run, Embeddings]], command: ReportCommand) -> Picture:
    name, title = "map", "Map of embeddings"
    if command.map == "none":
        return Picture(name, title, "Not asked for (--map none).")
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
        return Picture(name, title, "There are no embeddings to draw.")
    return snapshots.embedding_map(maps, METHODS[command.map])


def _write(page: Path, html: str, pictures: Sequence[Picture]) -> None:
    """Write the page, and beside it its figures as figures/<page>-<name>.png."""
    folder = page.parent / FIGURES
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            if picture.png:
                atomic_files.replace(folder / f"{page.stem}-{picture.name}.png", picture.png)
        atomic_files.replace(page, html)
    except OSError as error:
        raise CannotCreate(
            f"{page} cannot be written ({error.strerror}): give --out a name in a writable folder"
        ) from error
