"""Evaluation of few or odd images gives a result that says what was lowered, or one error line."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_fast.config import AugmentConfig, Config, DataConfig
from rdm_fast.errors import DataError, InputMissing, UserError
from rdm_fast.evaluation import run as evaluation
from rdm_fast.evaluation import score
from rdm_fast.evaluation.loaded_backbone import load_for_evaluation
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.evaluation.protocols import PROTOCOLS
from rdm_fast.evaluation.score import Result
from rdm_fast.runtime.distributed import rank
from tests.data.files import encode, natural, put
from tests.forks import call
from tests.random_run import save_random
from tests.ranks import run_ranks
from tests.runs import metrics, run, with_log
from tests.tiny import tiny

CPU = torch.device("cpu")
PNGS = [encode(Image.fromarray(pixels)) for pixels in natural(40, 16, 18)]


def images(folder: Path, counts: dict[str, int], seed: int = 0) -> None:
    """As many images in each class folder; those of the class "" lie beside them."""
    for k, (name, n) in enumerate(counts.items()):
        for i in range(n):
            put(folder / name / f"{i}.png", PNGS[(seed + 7 * k + i) % len(PNGS)])


def data_set(root: Path, train: dict[str, int], test: dict[str, int]) -> Path:
    images(root / "train", train)
    images(root / "val", test, seed=5)
    return root


def config_of(root: Path, batch: int = 2, **data: Any) -> Config:
    """Two steps on images in a folder."""
    config = with_log(tiny("digits_simsiam", global_batch=batch, epochs=1), knn_every=1)
    folder = DataConfig(name="folder", root=str(root), loader="torch", workers=0, **data)
    return replace(config, data=folder, augment=AugmentConfig(size=8))


def evaluate(checkpoint: Path, **options: Any) -> Result:
    command = EvaluateCommand(checkpoint=str(checkpoint), **options)
    result = evaluation.evaluate(load_for_evaluation(command), command, CPU)
    assert result is not None
    return result


# ---- evaluation ------------------------------------------------------------------------------

HOW: dict[str, dict[str, Any]] = {
    **{name: {"protocol": name} for name in PROTOCOLS},
    "on views": {"protocol": "reference-cifar", "augment": True, "epochs": 2},
    "a last batch on views": {"protocol": "reference-imagenet", "augment": True, "epochs": 2},
    "fine-tuning": {"finetune": True, "epochs": 2},
}
THREE = {"a": 3, "b": 3, "c": 3}
FEW: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "three of three classes": (THREE, {"a": 1, "b": 2}),
    "two images": ({"a": 1, "b": 1}, {"b": 1}),
    "a class of one": ({"a": 9, "b": 1, "c": 2}, {"a": 2, "b": 2, "c": 2}),
    "a test set of one class": ({"a": 12, "b": 12}, {"b": 2}),
}


@pytest.fixture(scope="module", params=FEW)
def few(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights on few images."""
    folder = tmp_path_factory.mktemp("few")
    root = data_set(folder / "data", *FEW[request.param])
    save_random(folder / "run", config_of(root))
    return folder / "run"


@pytest.mark.parametrize("how", HOW)
def test_every_protocol_scores_few_images(
    how: str, few: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(few, **HOW[how])
    n = found.train_images
    assert 0 <= found.top1 <= 100 and found.knn_top1 is not None
    assert found.knn_k == min(20, n) and found.batch == n
    fewest = min(len([*each.iterdir()]) for each in few.parent.glob("data/train/*/"))
    assert len(found.lowered) == (n < 20) + (how == "logistic" and fewest < 5)
    out, err = capfd.readouterr()
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == bool(found.lowered) and not err
    assert all(text in warnings[0] for text in found.lowered)
    plain = json.loads((few / f"evaluation/step-00000001-{found.label}.json").read_text())
    assert plain["lowered"] == found.lowered and plain["knn_k"] == found.knn_k


def test_the_probes_result_is_kept_when_knn_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random(tmp_path / "run", config_of(data_set(tmp_path / "data", THREE, THREE)))
    whole = evaluate(tmp_path / "run")
    file = tmp_path / "run/evaluation/step-00000001-closed-form.json"
    file.unlink()

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room for the similarities")

    monkeypatch.setattr(score, "knn_accuracy", fail)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(tmp_path / "run")
    kept = json.loads(file.read_text())
    assert (kept["top1"], kept["knn_top1"]) == (whole.top1, None)


UNUSABLE: dict[str, tuple[dict[str, int], dict[str, int], type[UserError], str]] = {
    "one class": ({"a": 30}, {"a": 3}, DataError, "class"),
    "one class with a file": ({"a": 30, "b": 0}, {"a": 3}, DataError, "class"),
    "no test set": (THREE, {}, InputMissing, "--data.root"),
    "an empty test set": (THREE, {"a": 0}, DataError, "val"),
    "a class that training lacks": (THREE, {"a": 1, "z": 1}, DataError, "z"),
    "no training labels": ({"": 9}, THREE, DataError, "training images have no labels"),
    "no test labels": (THREE, {"": 9}, DataError, "test images have no labels"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_images_without_an_accuracy_are_one_error(case: str, tmp_path: Path) -> None:
    train, test, kind, named = UNUSABLE[case]
    root = data_set(tmp_path / "data", train, test)
    for split, counts in (("train", train), ("val", test)):
        for name in counts:
            (root / split / name).mkdir(parents=True, exist_ok=True)
    save_random(tmp_path / "run", config_of(root))
    for how in ("closed-form", "on views", "fine-tuning"):
        with pytest.raises(kind) as caught:
            evaluate(tmp_path / "run", **HOW[how])
        assert named in str(caught.value)


def test_the_command_prints_one_line_and_its_code(tmp_path: Path) -> None:
    root = data_set(tmp_path / "data", THREE, THREE)
    save_random(tmp_path / "run", config_of(root))
    done = call("eval_linear.py", "run", "--protocol", "logistic", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    shutil.rmtree(root / "train/b"), shutil.rmtree(root / "train/c")
    shutil.rmtree(root / "val/b"), shutil.rmtree(root / "val/c")
    done = call("eval_linear.py", "run", cwd=tmp_path)
    assert done.returncode == 65 and len(done.stderr.splitlines()) == 1


def test_a_bad_image_does_not_end_a_probe_on_views(tmp_path: Path) -> None:
    root = data_set(tmp_path / "data", {"a": 12, "b": 12}, THREE | {"c": 0})
    whole = PNGS[0]
    put(root / "train/a/0.png", whole[:60] + bytes(20) + whole[80:])  # found only by decoding
    save_random(tmp_path / "run", config_of(root))
    assert evaluate(tmp_path / "run", **HOW["fine-tuning"]).train_images == 23


def more_ranks_than_images(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        evaluate(path, **HOW["on views"])
    assert caught.value.code == 2
    return str(caught.value)


def test_more_ranks_than_images_are_refused(tmp_path: Path) -> None:
    save_random(tmp_path / "run", config_of(data_set(tmp_path / "data", {"a": 1, "b": 1}, THREE)))
    shutil.rmtree(tmp_path / "data/val/c")
    found = run_ranks(3, more_ranks_than_images, tmp_path / "run", tmp_path=tmp_path)
    assert all("--nproc" in text for text in found)


# ---- while training --------------------------------------------------------------------------


def empty(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()


def flat(root: Path) -> None:
    shutil.rmtree(root / "val")
    images(root / "val", {"": 4})


def gone(root: Path) -> None:
    shutil.rmtree(root / "val")


def another_class(root: Path) -> None:
    images(root / "val", {"zebra": 1})


def bad_files(root: Path) -> None:
    for path in (root / "val/a").iterdir():
        path.write_bytes(b"")


def one_class(root: Path) -> None:
    shutil.rmtree(root / "train/b"), shutil.rmtree(root / "val/b")


def no_labels(root: Path) -> None:
    for k, path in enumerate((root / "train").glob("*/*")):
        path.rename(root / f"train/{k}.png")
    shutil.rmtree(root / "train/a"), shutil.rmtree(root / "train/b")


def a_file(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").write_text("moved")


SPOILS = [empty, flat, gone, another_class, bad_files, one_class, no_labels, a_file]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_training_goes_on_without_usable_test_images(
    spoil: Callable[[Path], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = data_set(tmp_path / "data", {"a": 8, "b": 8}, {"a": 5, "b": 5})
    spoil(root)
    run(tmp_path / "run", config_of(root, batch=4))
    out, _ = capfd.readouterr()
    assert out.count("no kNN while training: ") == 1
    assert all("knn_top1" not in line for line in metrics(tmp_path / "run"))


PIXELS = natural(8, 12, 12)
HALVES = np.arange(8) % 2
PACKED: dict[str, dict[str, Any]] = {
    "of one channel": {"test_images": PIXELS[..., 0], "test_label": HALVES},
    "without labels": {"test_images": PIXELS},
    "with unknown labels": {"test_images": PIXELS, "test_label": HALVES + 5},
    "absent": {},
}


@pytest.mark.parametrize("case", PACKED)
def test_training_goes_on_without_usable_packed_test_images(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    classes = np.array(["a", "b"])
    train = {"train_images": PIXELS, "train_label": HALVES, "classes": classes}
    np.savez(tmp_path / "x.npz", **train, **PACKED[case])
    config = config_of(tmp_path / "x.npz")
    run(tmp_path / "run", replace(config, data=replace(config.data, name="arrays")))
    assert capfd.readouterr().out.count("no kNN while training: ") == 1
    assert all("knn_top1" not in line for line in metrics(tmp_path / "run"))


def test_few_training_images_vote_for_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = data_set(tmp_path / "data", {"a": 3, "b": 3}, {"a": 2, "b": 2})
    run(tmp_path / "run", config_of(root))
    assert capfd.readouterr().out.count("vote in kNN, not 20") == 1
    assert len([1 for line in metrics(tmp_path / "run") if "knn_top1" in line]) == 2


def test_test_images_that_turn_bad_are_left_out_or_end_only_knn(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are whole when the index reads their headers, and damaged in the middle."""
    root = data_set(tmp_path / "data", {"a": 12, "b": 12}, {"a": 5, "b": 1})
    damaged = PNGS[0][:60] + bytes(20) + PNGS[0][80:]
    for i in range(5):  # more than training would allow
        put(root / f"val/a/{i}.png", damaged)
    run(tmp_path / "some", config_of(root, batch=8))
    assert any("knn_top1" in line for line in metrics(tmp_path / "some"))
    for path in (root / "val").glob("*/*"):
        path.write_bytes(damaged)
    run(tmp_path / "all", config_of(root, batch=8))
    assert capfd.readouterr().out.count("no kNN while training: ") == 1
    assert all("knn_top1" not in line for line in metrics(tmp_path / "all"))


def train_on_a_rank(path: Path, root: Path) -> list[str]:
    """Rank 1 sees another val folder."""
    config = config_of(root, batch=4)
    other = replace(config.data, root=str(root.with_name("other")))
    run(path, config if rank() == 0 else replace(config, data=other))
    return [key for line in metrics(path) for key in line]


@pytest.mark.parametrize("spoil", [gone, empty, lambda root: (root / "val/a/0.png").unlink()])
def test_ranks_that_see_other_test_images_train_without_knn(
    spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    root = data_set(tmp_path / "data", {"a": 8, "b": 8}, {"a": 5, "b": 5})
    spoil(Path(shutil.copytree(root, tmp_path / "other")))
    for keys in run_ranks(2, train_on_a_rank, tmp_path / "run", root, tmp_path=tmp_path):
        assert "loss" in keys and "knn_top1" not in keys
