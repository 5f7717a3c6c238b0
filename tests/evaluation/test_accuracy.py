"""rdm_fast.evaluation.accuracy against scikit-learn's top-k accuracy and by hand."""

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from rdm_fast.evaluation.accuracy import check_labels, rank_classes, topk_accuracy


@pytest.mark.parametrize("k", [1, 2, 5])
def test_topk_accuracy_equals_scikit_learns(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 7, generator=generator)
    labels = torch.randint(7, (200,), generator=generator)
    expected = 100 * top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k, labels=range(7))
    assert topk_accuracy(rank_classes(scores), labels, k) == pytest.approx(expected, abs=1e-9)


def test_equal_scores_rank_by_class_id() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 1.0, 1.0, 3.0]])
    assert rank_classes(scores, 4).tolist() == [[1, 2, 5, 0]]


def test_with_three_classes_top_five_is_always_right() -> None:
    labels = torch.tensor([0, 1, 2, 2])
    ranking = rank_classes(torch.randn(4, 3))
    assert ranking.shape == (4, 3)
    assert topk_accuracy(ranking, labels, 5) == 100


def test_accuracy_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        topk_accuracy(torch.empty(0, 5, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 1)


FEATURES = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (FEATURES, torch.tensor([0, 1]), r"one for each of 3 features: got torch.int64 \(2,\)"),
        (FEATURES, torch.tensor([0.0, 1.0, 2.0]), "must be int64.*got torch.float32"),
        (FEATURES, torch.tensor([0, 1, 3]), "from 0 to 3, but 3 classes have ids 0 to 2"),
        (FEATURES, torch.tensor([0, -1, 2]), "from -1 to 2"),
        (FEATURES.long(), torch.tensor([0, 1, 2]), r"floating \[N, d\] tensor: got torch.int64"),
        (FEATURES[:0], torch.tensor([], dtype=torch.int64), "non-empty"),
        (FEATURES[0], torch.tensor([0, 1]), r"\[N, d\] tensor: got torch.float32 \(2,\)"),
    ],
    ids=["count", "dtype", "too large", "negative", "integer features", "empty", "1d"],
)
def test_features_and_labels_that_do_not_fit_are_named(
    features: torch.Tensor, labels: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^probe .*{message}"):
        check_labels(features, labels, 3, "probe")
