"""rdm_fast.evaluation.score: the reported numbers are those of its parts; bad input is an error."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
from torch import Tensor

from rdm_fast.errors import NonFinite
from rdm_fast.evaluation.accuracy import rank_classes, topk_accuracy
from rdm_fast.evaluation.knn import knn_accuracy
from rdm_fast.evaluation.probe import fit_closed_form, fit_iterated
from rdm_fast.evaluation.protocols import PROTOCOLS
from rdm_fast.evaluation.score import Result, score
from tests.evaluation.embeddings import digits

TRAIN, TEST = digits()


def run(name: str, train: Any = TRAIN, test: Any = TEST, classes: int = 10) -> Result:
    return score(train, test, PROTOCOLS[name], classes=classes, seed=0)


def test_the_closed_form_reports_ridge_regression_with_the_lambda_it_names() -> None:
    result = run("closed-form")
    assert result.penalty is not None
    classifier = fit_closed_form(*TRAIN, classes=10, ridge=result.penalty)
    ranking = rank_classes(classifier.logits(TEST[0]))
    assert result.top1 == topk_accuracy(ranking, TEST[1], 1) > 90
    assert result.top5 == topk_accuracy(ranking, TEST[1], 5) > result.top1
    knn = knn_accuracy(*TRAIN, *TEST, classes=10, k=20, temperature=0.07)
    assert knn == (result.knn_top1, result.knn_top5) and knn[0] > 95
    assert result.knn_k == 20 and result.lowered == []
    assert (result.epochs, result.batch) == (0, result.train_images)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_repeats_bit_for_bit_and_counts_its_images(name: str) -> None:
    train = TRAIN[0][:300], TRAIN[1][:300]
    protocol = PROTOCOLS[name]
    first, again = (run(name, train) for _ in range(2))
    assert first == again
    assert (first.train_images, first.test_images) == (300, 397)
    whole = name in ("closed-form", "logistic")
    assert first.batch == (300 if whole else min(protocol.batch, 300))
    assert (first.penalty is None) == (not whole and name != "sgd-sweep")
    assert (first.lr is None) == whole
    assert bool(first.chosen) == (first.penalty is not None)
    assert json.loads(json.dumps(asdict(first))) == asdict(first)
    assert first.top1 > 25  # 10 classes; reference-imagenet takes only 90 steps here


@pytest.mark.parametrize("solver", ["sgd", "lars"])
def test_the_protocols_solver_fits(solver: Any) -> None:
    protocol = replace(PROTOCOLS["reference-imagenet"], solver=solver, epochs=20)
    classifier = fit_iterated(*TRAIN, classes=10, protocol=protocol, seed=4)
    top1 = topk_accuracy(rank_classes(classifier.logits(TEST[0])), TEST[1], 1)
    other = replace(protocol, solver="lars" if solver == "sgd" else "sgd")
    found = [score(TRAIN, TEST, which, classes=10, seed=4).top1 for which in (protocol, other)]
    assert found[0] == top1 != found[1]


def test_with_fewer_than_five_classes_top_five_is_over_all_of_them() -> None:
    train, test = ((X[Y < 3], Y[Y < 3]) for X, Y in (TRAIN, TEST))
    result = run("closed-form", train, test, classes=3)
    assert result.top5 == result.knn_top5 == 100


def test_training_labels_may_lack_classes() -> None:
    some = TRAIN[1] != 9
    result = run("closed-form", (TRAIN[0][some], TRAIN[1][some]))
    share = 100 * float((TEST[1] == 9).float().mean())
    assert share > 0 and result.top1 <= 100 - share


@pytest.mark.parametrize("where", ["train", "test"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_embeddings_that_are_not_finite_are_counted(where: str, value: float) -> None:
    features, labels = TRAIN if where == "train" else TEST
    features = features.clone()
    features[3, 5] = features[3, 6] = features[7, 0] = value
    with pytest.raises(NonFinite) as error:
        run("closed-form", **{where: (features, labels)})
    assert f"2 of {len(features)} {where}" in str(error.value)


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("train", lambda X, Y: (X, Y[1:])),
        ("test", lambda X, Y: (X, Y[1:])),
        ("test", lambda X, Y: (X, Y + 1)),
        ("test", lambda X, Y: (X[:, 1:], Y)),
        ("train", lambda X, Y: (X[0], Y)),
    ],
    ids=["train count", "test count", "label", "width", "1d"],
)
def test_sets_that_do_not_match_are_an_error(
    where: str, change: Callable[[Tensor, Tensor], Any]
) -> None:
    with pytest.raises(ValueError) as error:
        run("closed-form", **{where: change(*(TRAIN if where == "train" else TEST))})
    assert where in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["closed-form", "reference-cifar", "sgd-sweep"])
def test_a_gpu_gives_what_a_cpu_gives(name: str) -> None:
    train, test = ((X.cuda(), Y.cuda()) for X, Y in (TRAIN, TEST))
    found, expected = run(name, train, test), run(name)
    # two test images for rounding; half-precision cosines may swap neighbors of equal weight
    assert found.top1 == pytest.approx(expected.top1, abs=0.6)
    assert found.knn_top1 == pytest.approx(expected.knn_top1, abs=1.0)
