"""rdm_fast.evaluation.accuracy against scikit-learn's top-k accuracy and by hand."""

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor

from rdm_fast.evaluation.accuracy import check_labels, rank_classes, topk_accuracy


def test_topk_accuracy_equals_scikit_learns() -> None:
    scores, labels = torch.randn(200, 7), torch.randint(7, (200,))
    for k in (1, 2, 5):
        expected = 100 * top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k, labels=range(7))
        found = topk_accuracy(rank_classes(scores), labels, k)
        assert found == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError):
        topk_accuracy(torch.empty(0, 5).long(), torch.empty(0).long(), 1)


def test_equal_scores_rank_by_class_id_and_three_classes_are_a_whole_ranking() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 1.0, 1.0, 3.0]])
    assert rank_classes(scores, 4).tolist() == [[1, 2, 5, 0]]
    ranking = rank_classes(torch.randn(4, 3))
    assert ranking.shape == (4, 3)
    assert topk_accuracy(ranking, torch.tensor([0, 1, 2, 2]), 5) == 100


FEATURES = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (FEATURES, torch.tensor([0, 1])),
        (FEATURES, torch.tensor([0.0, 1.0, 2.0])),
        (FEATURES, torch.tensor([0, 1, 3])),
        (FEATURES, torch.tensor([0, -1, 2])),
        (FEATURES.long(), torch.tensor([0, 1, 2])),
        (FEATURES[:0], torch.tensor([], dtype=torch.int64)),
        (FEATURES[0], torch.tensor([0, 1])),
    ],
    ids=["count", "dtype", "too large", "negative", "integer features", "empty", "1d"],
)
def test_features_and_labels_that_do_not_match_are_an_error(
    features: Tensor, labels: Tensor
) -> None:
    with pytest.raises(ValueError) as error:
        check_labels(features, labels, 3, "bank")
    assert str(error.value).startswith("bank ")
