"""eval_linear on runs and files: the same backbone gives the same numbers, however it is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rdm_fast.config.recipes import RECIPES
from rdm_fast.errors import CannotCreate, DataError, InputMissing, UsageError
from rdm_fast.evaluation.loaded_backbone import find_subject
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.evaluation.run import evaluate_subject
from rdm_fast.evaluation.score import Result
from rdm_fast.methods import build_method
from rdm_fast.run import checkpoint
from rdm_fast.run.checkpoint import Snapshot
from rdm_fast.run.folder import RunFolder
from rdm_fast.tools.export.write import export_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights on digits, whose embeddings are worth something all the same."""
    config = RECIPES["digits_rdm_simsiam"]()
    model = replace(config.model, width=8, projector_hidden=8, projector_dim=8)
    config = replace(config, model=model)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "run"
    with RunFolder.open(str(path), config, overwrite=False, rank=0) as folder:
        snapshot = Snapshot(1, dict(build_method(config).state_dict()), {}, {}, {})
        checkpoint.save(folder.checkpoints, snapshot, 2)
    return path


@pytest.fixture(scope="module")
def weights(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same backbone, in a file."""
    out = tmp_path_factory.mktemp("weights") / "w.safetensors"
    export_checkpoint(run / "checkpoints" / "step-00000001", "safetensors", out=out)
    return out


def evaluate(checkpoint: Path, **changes: Any) -> Result:
    options: dict[str, Any] = {"protocol": "closed-form"} | changes
    command = EvaluateCommand(checkpoint=str(checkpoint), **options)
    result = evaluate_subject(find_subject(command), command, CPU)
    assert result is not None
    return result


def test_a_file_gives_what_its_run_gives_and_both_say_where(
    run: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_run = evaluate(run)
    told = capsys.readouterr().out
    assert of_run.top1 > 60 and "effective rank of the projections" in told
    of_file = evaluate(weights, recipe="digits_byol")
    told = capsys.readouterr().out
    assert of_file == of_run
    assert "rdm-fast layout, loaded" in told and "ignored" in told and "resnet8" in told
    saved = json.loads((weights.parent / "w.safetensors-evaluation/w-closed-form.json").read_text())
    assert saved["top1"] == of_run.top1 and "effective_rank" not in saved
    assert (run / "evaluation/step-00000001-closed-form.json").exists()


def test_other_weights_under_the_same_name_are_embedded_anew(weights: Path, tmp_path: Path) -> None:
    file, options = tmp_path / "w.safetensors", {"recipe": "digits_byol", "out": str(tmp_path)}
    tensors = load_file(weights)
    for scale in (1.0, -1.0):
        conv = "backbone.conv1.weight"
        save_file(tensors | {conv: scale * tensors[conv]}, file)
        found = evaluate(file, **options)
        assert evaluate(file, **options) == found
        if scale < 0:
            assert found.knn_top1 != evaluate(weights, **options).knn_top1


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
def test_features_are_written_for_other_programs(name: str, run: Path, tmp_path: Path) -> None:
    evaluate(run, features_out=str(tmp_path / "new" / name), out=str(tmp_path / "o"))
    file = tmp_path / "new" / name
    found: dict[str, Any] = dict(np.load(file)) if name == "f.npz" else dict(load_file(file))
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "train_features": (1400, 32), "train_labels": (1400,),
        "test_features": (397, 32), "test_labels": (397,),
    }  # fmt: skip
    cached = load_file(tmp_path / "o" / "step-00000001-test.safetensors")
    assert np.array_equal(np.asarray(found["test_features"]), cached["features"].numpy())
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(CannotCreate, match=f"{name} exists: name a new file"):
        evaluate(run, features_out=str(file))


def test_a_probe_on_views_is_a_result_of_its_own(run: Path, tmp_path: Path) -> None:
    out = str(tmp_path)
    plain = evaluate(run, protocol="reference-cifar", epochs=2, out=out)
    views = evaluate(run, protocol="reference-cifar", epochs=2, augment=True, out=out)
    again = evaluate(run, protocol="reference-cifar", epochs=2, augment=True, out=out)
    assert views == again
    assert (plain.trained_on, views.trained_on) == ("features", "views")
    assert plain.top1 != views.top1 and (plain.epochs, plain.batch) == (2, 256)
    assert views.knn_top1 == plain.knn_top1  # whose embeddings are those of the frozen backbone
    names = {file.name for file in tmp_path.glob("*.json")}
    assert names == {f"step-00000001-reference-cifar{end}.json" for end in ("", "-augmented")}


def test_fine_tuning_changes_the_backbone_and_no_cache(run: Path, tmp_path: Path) -> None:
    frozen = evaluate(run, out=str(tmp_path))
    cached = (tmp_path / "step-00000001-test.safetensors").read_bytes()
    tuned = evaluate(run, protocol="auto", finetune=True, epochs=2, lr=0.1, out=str(tmp_path))
    assert tuned.protocol == "finetune" and tuned.lr == 0.1
    assert tuned.knn_top1 != frozen.knn_top1
    assert (tmp_path / "step-00000001-test.safetensors").read_bytes() == cached
    assert evaluate(run, out=str(tmp_path)) == frozen


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, UsageError, "says nothing of images: name a recipe"),
        (
            {"recipe": "digits_byol", "arch": "resnet18"},
            DataError,
            "is a resnet8 and the model a r",
        ),
        (
            {"recipe": "digits_byol", "stem": "imagenet"},
            UsageError,
            "does not exist for model.back",
        ),
        ({"recipe": "cifar10_byol"}, DataError, r"images of 1 channel\(s\), and these have 3"),
        ({"recipe": "digits_byol", "prefix": "net."}, DataError, "begin with --prefix net."),
    ],
    ids=["no recipe", "arch", "stem", "channels", "prefix"],
)
def test_a_file_that_does_not_fit_is_told(
    options: dict[str, Any], kind: type[Exception], message: str, weights: Path
) -> None:
    with pytest.raises(kind, match=message):
        evaluate(weights, **options)


def test_what_is_for_files_is_refused_for_runs(run: Path) -> None:
    for options in ({"recipe": "digits_byol"}, {"arch": "resnet8"}, {"stem": "cifar"}):
        with pytest.raises(UsageError, match="is for a file of weights"):
            evaluate(run, **options)
    with pytest.raises(InputMissing, match="does not exist"):
        evaluate(run / "absent")


def test_an_output_that_cannot_be_made_is_told_before_anything_is_embedded(run: Path) -> None:
    with pytest.raises(CannotCreate, match="--out /proc/x cannot be made"):
        evaluate(run, out="/proc/x")


def refusal(**options: Any) -> Callable[[], object]:
    return lambda: EvaluateCommand(checkpoint="x", **options).protocol_for("cifar10")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (refusal(finetune=True, protocol="closed-form"), "finetune has a protocol of its own"),
        (refusal(finetune=True, precision="fp16"), "no loss scaling: use bf16 or fp32"),
        (refusal(features_out="x.pth"), r"name a file \.npz or \.safetensors"),
        (refusal(epochs=-1), "give numbers above 0"),
        (refusal(recipe="x"), "recipe=x is unknown"),
    ],
    ids=["protocol", "fp16", "suffix", "epochs", "recipe"],
)
def test_options_that_cannot_be_meant_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_settings_of_epochs_are_for_protocols_that_have_them() -> None:
    assert EvaluateCommand(checkpoint="x", augment=True).protocol_for("digits").solver == "sgd"
    changed = EvaluateCommand(checkpoint="x", protocol="reference-imagenet", epochs=3, lr=0.5)
    assert (changed.protocol_for("folder").epochs, changed.protocol_for("folder").lr) == (3, 0.5)
    for options in ({"augment": True}, {"epochs": 3}, {"lr": 1.0}):
        with pytest.raises(UsageError, match="closed-form is not"):
            EvaluateCommand(checkpoint="x", protocol="closed-form", **options).protocol_for(
                "folder"
            )  # type: ignore[arg-type]
