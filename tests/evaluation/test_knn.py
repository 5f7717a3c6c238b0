"""rdm_fast.evaluation.knn against scikit-learn's brute-force neighbors in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rdm_fast.evaluation import knn
from rdm_fast.evaluation.knn import knn_accuracy, knn_predict

CLASSES = 9


def data(seed: int = 0, N: int = 300, M: int = 80, d: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Bank, its labels, and queries, with norms that vary so that cosine is not Euclidean."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N + M, d, generator=generator)
    rows *= torch.rand(N + M, 1, generator=generator) * 5 + 0.1
    return rows[:N], torch.randint(CLASSES, (N,), generator=generator), rows[N:]


def test_neighbors_are_scikit_learns() -> None:
    bank, _, queries = data()
    own_class = torch.arange(len(bank))  # so a ranking of classes is one of neighbors
    ranking = knn_predict(bank, own_class, queries, classes=len(bank), k=5)
    brute = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute")
    expected = brute.fit(bank.double().numpy()).kneighbors(
        queries.double().numpy(), return_distance=False
    )
    assert ranking.tolist() == expected.tolist()


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("k", [1, 20, 300])
def test_votes_are_scikit_learns_weighted_ones(k: int, temperature: float) -> None:
    bank, labels, queries = data()
    model = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp(-distance / temperature),
    ).fit(bank.double().numpy(), labels.numpy())
    shares = model.predict_proba(queries.double().numpy())
    ranking = knn_predict(bank, labels, queries, classes=CLASSES, k=k, temperature=temperature)
    for row, share in zip(ranking.tolist(), shares, strict=True):
        # Stable, so that classes without a vote rank by id; float32 cannot reorder real votes
        # that differ by more than its rounding of cosine / T, 6e-8 / 0.01.
        expected = np.sort(share)[::-1][: len(row)]
        np.testing.assert_allclose(share[row], expected, atol=2e-5)
    assert model.predict(queries.double().numpy()).tolist() == ranking[:, 0].tolist()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 100), st.integers(0, 2**31))
def test_the_chunk_changes_no_prediction(chunk: int, seed: int) -> None:
    bank, labels, queries = data(seed, N=60, M=33)
    whole = knn_predict(bank, labels, queries, classes=CLASSES, k=7)
    parts = knn_predict(bank, labels, queries, classes=CLASSES, k=7, chunk=chunk)
    # A product of another shape may round differently, and so swap an exact near-tie.
    assert (whole[:, 0] == parts[:, 0]).float().mean() >= 32 / 33


def test_a_vanishing_temperature_is_the_nearest_neighbor_alone() -> None:
    bank, labels, queries = data()
    nearest = knn_predict(bank, labels, queries, classes=CLASSES, k=1)
    cold = knn_predict(bank, labels, queries, classes=CLASSES, k=20, temperature=1e-6)
    assert cold[:, 0].tolist() == nearest[:, 0].tolist()


def test_rescaling_an_embedding_changes_nothing() -> None:
    bank, labels, queries = data()
    powers_of_two = 2.0 ** torch.randint(-8, 8, (len(bank), 1))  # exact in float32
    scaled = knn_predict(bank * powers_of_two, labels, queries * 4, classes=CLASSES)
    assert scaled.tolist() == knn_predict(bank, labels, queries, classes=CLASSES).tolist()


def test_zero_embeddings_are_similar_to_nothing() -> None:
    bank, labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]), torch.tensor([2, 1, 0])
    ranking = knn_predict(bank, labels, torch.tensor([[3.0, 0.0]]), classes=3, k=3)
    assert ranking.tolist() == [[2, 1, 0]]


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("M", [50, 800])
def test_memory_does_not_grow_with_the_queries(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels, queries = data(N=1000, M=M, d=3)
    monkeypatch.setattr(knn, "MAX_SIMILARITIES", 10_000)
    with Largest() as default:
        knn_predict(bank, labels, queries, classes=CLASSES)
    assert default.numel == 10_000  # ten queries by a bank of 1000, not M by 1000
    with Largest() as chosen:
        knn_predict(bank, labels, queries, classes=CLASSES, chunk=25)
    assert chosen.numel == 25_000


def test_a_query_is_compared_even_if_its_similarities_exceed_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank, labels, queries = data(N=100)
    expected = knn_predict(bank, labels, queries, classes=CLASSES, chunk=1)
    monkeypatch.setattr(knn, "MAX_SIMILARITIES", 10)
    assert torch.equal(knn_predict(bank, labels, queries, classes=CLASSES), expected)


def test_accuracy_counts_hits() -> None:
    bank, labels = torch.eye(6).repeat_interleave(2, 0), torch.arange(6).repeat_interleave(2)
    queries, truth = torch.eye(6), torch.tensor([0, 1, 2, 3, 0, 1])  # the last two are wrong
    found = knn_accuracy(bank, labels, queries, truth, classes=6, k=2)
    # Without a vote, classes rank by id: 0 and 1 come right after the one that was voted for.
    assert found == {"top1": pytest.approx(100 * 4 / 6), "top5": 100}


def test_half_precision_changes_only_votes_that_are_nearly_equal() -> None:
    bank, labels, queries = data(N=600, M=200, d=16)
    found = {
        dtype: knn_predict(bank * 1e4, labels, queries, classes=CLASSES, k=20, dtype=dtype)
        for dtype in (torch.float16, torch.float32)
    }
    # 1e4 times five: squares overflow float16, unit rows do not. Labels are random, so every vote
    # is close, and yet few change.
    same = (found[torch.float16][:, 0] == found[torch.float32][:, 0]).float().mean()
    assert same >= 0.95
    default = knn_predict(bank * 1e4, labels, queries, classes=CLASSES, k=20)
    assert torch.equal(default, found[torch.float32])  # on a CPU


def test_half_precision_finds_the_neighbors_that_stand_apart() -> None:
    corners = torch.eye(8)
    bank, labels = corners.repeat(3, 1) * 1e15, torch.arange(8).repeat(3)
    ranking = knn_predict(bank, labels, corners * 1e-6, classes=8, k=3, dtype=torch.float16)
    assert ranking[:, 0].tolist() == list(range(8))


def test_bank_images_find_themselves() -> None:
    bank, labels, _ = data()
    assert knn_accuracy(bank, labels, bank, labels, classes=CLASSES, k=1)["top1"] == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 301}, "k=301 needs a bank of at least 301 images.*the bank has 300"),
        ({"k": 0}, "k at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 is not positive"),
        ({"chunk": 0}, "chunk=0"),
        ({"classes": 3}, "bank labels run from 0 to 8, but 3 classes"),
        ({"queries": torch.zeros(4, 5)}, r"queries must be \[M, 6\] like the bank: got \(4, 5\)"),
        ({"bank_labels": torch.zeros(3, dtype=torch.int64)}, "bank labels must be int64"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_impossible_requests_are_named(changes: dict[str, Any], message: str) -> None:
    bank, labels, queries = data()
    request: dict[str, Any] = {"bank": bank, "bank_labels": labels, "queries": queries}
    with pytest.raises(ValueError, match=message):
        knn_predict(**(request | {"classes": CLASSES} | changes))
