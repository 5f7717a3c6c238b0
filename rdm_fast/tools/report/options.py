"""Command line of `rdm report`. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from rdm_fast.config.checks import Between, require, require_fields

Layout = Literal["tsne", "umap", "none"]


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Draw runs: a page of HTML with their curves, spectra and embeddings."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders, or folders of them, such as a sweep's."""
    out: str | None = None
    """The page; by default report.html in the run folder, or for several runs in this folder."""
    map: Layout = "tsne"
    """Draw embeddings by t-SNE, by UMAP (extra rdm-fast[umap]), or not at all."""
    images: Annotated[int, Between(10, 100_000)] = 1000
    """Largest number of images on a map, evenly spread over the test set."""
    data_root: str | None = None
    """Where the data set of these runs is now, if not where they found it."""
    seed: Annotated[int, Between(0, 2**32 - 1)] = 0
    """Seed of the map."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where checkpoints run; auto takes a GPU if there is one."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        require_fields("--", self)
        require(bool(self.runs), "name one or more run folders, such as runs/digits_rdm_simsiam")
        require(
            self.out is None or self.out.endswith(".html"),
            f"--out {self.out} is not a page: give a name that ends in .html",
        )
