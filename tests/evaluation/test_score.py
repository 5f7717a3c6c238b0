"""rdm_fast.evaluation.score: the reported numbers are those of its parts, and are refusable."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from rdm_fast.errors import NonFinite
from rdm_fast.evaluation.accuracy import rank_classes, topk_accuracy
from rdm_fast.evaluation.knn import knn_accuracy
from rdm_fast.evaluation.probe import LinearClassifier, fit_closed_form, fit_lars, fit_sgd
from rdm_fast.evaluation.protocols import PROTOCOLS, Solver
from rdm_fast.evaluation.score import Result, evaluate


def digits(classes: int = 10) -> dict[str, Any]:
    pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    pixels, labels = pixels[labels < classes].float() / 16, labels[labels < classes]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test = len(labels) // 4
    return {
        "train_features": pixels[order[test:]],
        "train_labels": labels[order[test:]],
        "test_features": pixels[order[:test]],
        "test_labels": labels[order[:test]],
    }


def run(name: str, classes: int = 10, **changes: Any) -> Result:
    return evaluate(
        **(digits(classes) | changes), protocol=PROTOCOLS[name], classes=classes, seed=0
    )


def test_the_default_reports_ridge_regression_with_the_lambda_it_names() -> None:
    data, result = digits(), run("closed-form")
    assert result.penalty is not None
    train, truth = (data["train_features"], data["train_labels"]), data["test_labels"]
    classifier = fit_closed_form(*train, classes=10, ridge=result.penalty)
    ranking = rank_classes(classifier.logits(data["test_features"]))
    assert result.top1 == topk_accuracy(ranking, truth, 1) > 90
    assert result.top5 == topk_accuracy(ranking, truth, 5) > result.top1
    knn = knn_accuracy(*train, data["test_features"], truth, classes=10, k=20, temperature=0.07)
    assert knn == {"top1": result.knn_top1, "top5": result.knn_top5}
    assert result.knn_top1 > 95
    assert (result.epochs, result.batch) == (0, result.train_images)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_repeats_bit_for_bit_and_counts_its_images(name: str) -> None:
    first, again = run(name), run(name)
    assert first == again
    assert (first.train_images, first.test_images) == (1348, 449)
    whole = name in ("closed-form", "logistic")
    assert first.batch == (1348 if whole else min(PROTOCOLS[name].batch, 1348))
    assert (first.penalty is None) == (not whole and name != "sgd-sweep")
    assert (first.lr is None) == whole
    assert json.loads(json.dumps(first.as_dict())) == first.as_dict()
    assert first.top1 > 50  # 10 classes; reference-imagenet takes only 90 steps on this few


@pytest.mark.parametrize(("solver", "fit"), [("sgd", fit_sgd), ("lars", fit_lars)])
def test_the_protocols_solver_is_the_one_that_fits(
    solver: Solver, fit: Callable[..., LinearClassifier]
) -> None:
    data, truth = digits(), digits()["test_labels"]
    protocol = replace(PROTOCOLS["reference-imagenet"], solver=solver, epochs=20)
    train = (data["train_features"], data["train_labels"])
    classifier = fit(*train, classes=10, protocol=protocol, seed=4)
    top1 = topk_accuracy(rank_classes(classifier.logits(data["test_features"])), truth, 1)
    other: Solver = "lars" if solver == "sgd" else "sgd"
    found = [
        evaluate(**data, protocol=replace(protocol, solver=which), classes=10, seed=4).top1
        for which in (solver, other)
    ]
    assert found[0] == top1 != found[1]


def test_with_fewer_than_five_classes_top_five_is_over_all_of_them() -> None:
    result = run("closed-form", classes=3)
    assert result.top5 == result.knn_top5 == 100


def test_training_and_test_labels_may_lack_classes() -> None:
    data = digits()
    some = data["train_labels"] != 9
    result = run(
        "closed-form",
        train_features=data["train_features"][some],
        train_labels=data["train_labels"][some],
    )
    share = 100 * float((data["test_labels"] == 9).float().mean())
    assert share > 0 and result.top1 <= 100 - share


@pytest.mark.parametrize("where", ["train_features", "test_features"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_embeddings_that_are_not_finite_are_counted(where: str, value: float) -> None:
    features = digits()[where].clone()
    features[3, 5] = features[3, 6] = features[7, 0] = value
    with pytest.raises(NonFinite, match=f"2 of {len(features)} .* not finite"):
        run("closed-form", **{where: features})


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("train_labels", lambda t: t[1:], "training labels must be int64, one for each of 1348"),
        ("test_labels", lambda t: t[1:], "test labels must be int64, one for each of 449"),
        ("test_labels", lambda t: t + 1, "test labels run from 1 to 10, but 10 classes"),
        ("test_features", lambda t: t[:, 1:], "have 64 dimensions and test features 63"),
        ("train_features", lambda t: t[0], "training features must be"),
    ],
    ids=["train count", "test count", "label", "width", "1d"],
)
def test_sets_that_do_not_fit_are_named(where: str, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("closed-form", **{where: change(digits()[where])})


def test_fewer_images_than_neighbors_are_refused() -> None:
    data = digits()
    few = {name: data[name][:19] for name in ("train_features", "train_labels")}
    with pytest.raises(ValueError, match=r"k=20 needs a bank of at least 20 images.*has 19"):
        run("closed-form", **few)
    protocol = replace(PROTOCOLS["closed-form"], knn_k=19)
    result = evaluate(**(data | few), protocol=protocol, classes=10, seed=0)
    assert result.train_images == 19


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["closed-form", "reference-cifar", "sgd-sweep"])
def test_a_gpu_gives_what_a_cpu_gives(name: str) -> None:
    on_gpu = {key: tensor.cuda() for key, tensor in digits().items()}
    found, expected = run(name, **on_gpu), run(name)
    # two test images for rounding; half-precision cosines may swap neighbors of equal weight
    assert found.top1 == pytest.approx(expected.top1, abs=0.5)
    assert found.knn_top1 == pytest.approx(expected.knn_top1, abs=1.0)
