"""Embeddings in two dimensions, by scikit-learn's t-SNE or by UMAP."""

import importlib
import importlib.util
import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rdm_fast.errors import Unavailable

FEWEST = 10
"""Fewest images of a meaningful map."""
NEIGHBORS = 15
PERPLEXITY = 30.0
DIMENSIONS = 50
"""Principal components that t-SNE and UMAP start from."""


def require_umap() -> None:
    """Check that UMAP can be imported, before anything takes time.

    Raises:
        Unavailable: it is not installed.
    """
    if importlib.util.find_spec("umap") is None:
        raise Unavailable(
            '--map umap needs a package that is not installed: pip install "rdm-fast[umap]", '
            "or leave --map out for t-SNE"
        )


def flatten(
    rows: NDArray[np.float32], how: Literal["tsne", "umap"], seed: int
) -> NDArray[np.float64]:
    """Two coordinates for each row, reproducible for the same arguments and library versions.

    Rows are normalized, as for kNN, and reduced to 50 principal components.

    Args:
        rows: embeddings, [n, d_emb] with n >= FEWEST, finite.
        how: t-SNE (van der Maaten & Hinton, JMLR 2008; perplexity 30, or a third of the rows) or
            UMAP (arXiv:1802.03426; 15 neighbors).
        seed: of the method's random numbers.

    Returns:
        [n, 2] float64.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    points = rows / np.maximum(lengths, np.finfo(np.float32).tiny)
    components = min(DIMENSIONS, *points.shape)
    points = PCA(components, svd_solver="full").fit_transform(points)
    if how == "tsne":
        perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
        mapped = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)
    else:
        umap: Any = importlib.import_module("umap")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # UMAP warns that a seed costs it its threads
            neighbors = min(NEIGHBORS, len(points) - 1)
            mapped = umap.UMAP(n_neighbors=neighbors, random_state=seed).fit_transform(points)
    return np.asarray(mapped, dtype=np.float64)
