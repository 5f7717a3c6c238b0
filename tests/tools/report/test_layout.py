"""rdm_fast.tools.report.layout: clusters stay clusters, and the same rows give the same map."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier

from rdm_fast.errors import Unavailable
from rdm_fast.tools.report import layout
from rdm_fast.tools.report.layout import FEWEST, flatten, require_umap
from tests.spies import refused


def clusters(each: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Three directions in 20 dimensions, with noise of a third of their length."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), each)
    rows = np.eye(3, 20)[labels] + generator.normal(scale=0.3 / 20**0.5, size=(3 * each, 20))
    return rows.astype(np.float32), labels


def test_clusters_stay_clusters_whatever_the_rows_lengths() -> None:
    rows, labels = clusters(30)
    lengths = np.random.default_rng(1).uniform(0.1, 10, size=(len(rows), 1)).astype(np.float32)
    points = flatten(rows * lengths, "tsne", seed=0)
    assert points.shape == (90, 2) and np.isfinite(points).all()
    assert KNeighborsClassifier(5).fit(points, labels).score(points, labels) == 1.0


def test_the_fewest_rows_can_be_drawn_and_give_the_same_map_again() -> None:
    rows = clusters(10)[0][:FEWEST]
    points = flatten(rows, "tsne", 3)
    assert points.shape == (FEWEST, 2)
    np.testing.assert_array_equal(points, flatten(rows, "tsne", 3))


def test_a_missing_umap_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout.importlib.util, "find_spec", lambda name: None)
    with refused(Unavailable, "rdm-fast[umap]"):
        require_umap()
