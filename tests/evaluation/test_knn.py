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


BANK, LABELS, QUERIES = data()


def predict(bank: Tensor = BANK, queries: Tensor = QUERIES, **options: Any) -> Tensor:
    return knn_predict(bank, LABELS, queries, **({"classes": CLASSES} | options))


def test_neighbors_are_scikit_learns() -> None:
    own_class = torch.arange(len(BANK))  # so a ranking of classes is one of neighbors
    ranking = knn_predict(BANK, own_class, QUERIES, classes=len(BANK), k=5)
    brute = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute")
    expected = brute.fit(BANK.double().numpy()).kneighbors(
        QUERIES.double().numpy(), return_distance=False
    )
    assert ranking.tolist() == expected.tolist()


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("k", [1, 20, 300])
def test_votes_are_scikit_learns_weighted_ones(k: int, temperature: float) -> None:
    model = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp(-distance / temperature),
    ).fit(BANK.double().numpy(), LABELS.numpy())
    shares = model.predict_proba(QUERIES.double().numpy())
    ranking = predict(k=k, temperature=temperature)
    for row, share in zip(ranking.tolist(), shares, strict=True):
        # Classes without a vote rank by id; float32 cannot reorder real votes that differ by more
        # than its rounding of cosine / T, 6e-8 / 0.01.
        expected = np.sort(share)[::-1][: len(row)]
        np.testing.assert_allclose(share[row], expected, atol=2e-5)
    assert model.predict(QUERIES.double().numpy()).tolist() == ranking[:, 0].tolist()


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 100), st.integers(0, 2**31))
def test_the_chunk_changes_no_prediction(chunk: int, seed: int) -> None:
    bank, labels, queries = data(seed, N=60, M=33)
    whole = knn_predict(bank, labels, queries, classes=CLASSES, k=7)
    parts = knn_predict(bank, labels, queries, classes=CLASSES, k=7, chunk=chunk)
    # A product of another shape may round differently, and so swap an exact near-tie.
    assert (whole[:, 0] == parts[:, 0]).float().mean() >= 32 / 33


def test_a_vanishing_temperature_is_the_nearest_neighbor_alone() -> None:
    cold = predict(k=20, temperature=1e-6)
    assert cold[:, 0].tolist() == predict(k=1)[:, 0].tolist()


def test_rescaling_an_embedding_changes_nothing() -> None:
    powers_of_two = 2.0 ** torch.randint(-8, 8, (len(BANK), 1))  # exact in float32
    assert predict(BANK * powers_of_two, QUERIES * 4).tolist() == predict().tolist()


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
    with Largest() as many_classes:
        knn_predict(bank, labels, queries, classes=2000)
    assert many_classes.numel == 10_000  # the votes of five queries


def test_a_query_is_compared_even_if_its_similarities_exceed_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = predict(chunk=1)
    monkeypatch.setattr(knn, "MAX_SIMILARITIES", 10)
    assert torch.equal(predict(), expected)


def test_accuracy_counts_hits() -> None:
    bank, labels = torch.eye(6).repeat_interleave(2, 0), torch.arange(6).repeat_interleave(2)
    queries, truth = torch.eye(6), torch.tensor([0, 1, 2, 3, 0, 1])  # the last two are wrong
    found = knn_accuracy(bank, labels, queries, truth, classes=6, k=2)
    # Without a vote, classes rank by id: 0 and 1 come right after the one that was voted for.
    assert found == (pytest.approx(100 * 4 / 6), 100)
    assert knn_accuracy(BANK, LABELS, BANK, LABELS, classes=CLASSES, k=1)[0] == 100


def test_half_precision_changes_only_votes_that_are_nearly_equal() -> None:
    # 1e4 times five: squares overflow float16, unit rows do not. Labels are random, so every vote
    # is close, and yet few change.
    half, full = (predict(BANK * 1e4, dtype=dtype) for dtype in (torch.float16, torch.float32))
    assert (half[:, 0] == full[:, 0]).float().mean() >= 0.95
    assert torch.equal(predict(BANK * 1e4), full)  # the default on a CPU


def test_half_precision_finds_the_neighbors_that_stand_apart() -> None:
    corners = torch.eye(8)
    bank, labels = corners.repeat(3, 1) * 1e15, torch.arange(8).repeat(3)
    ranking = knn_predict(bank, labels, corners * 1e-6, classes=8, k=3, dtype=torch.float16)
    assert ranking[:, 0].tolist() == list(range(8))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": 301}, "k=301"),
        ({"k": 0}, "k=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"chunk": 0}, "chunk=0"),
        ({"classes": 3}, "bank labels"),
        ({"queries": torch.zeros(4, 5)}, "queries"),
        ({"bank": torch.zeros(3, 6)}, "bank labels"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_impossible_requests_are_errors_that_name_them(changes: Any, named: str) -> None:
    with pytest.raises(ValueError) as error:
        predict(**changes)
    assert named in str(error.value)
