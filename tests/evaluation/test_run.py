"""eval_linear on runs and files: one backbone gives the same numbers, however it is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rdm_fast.config import Config, ModelConfig
from rdm_fast.errors import CannotCreate, DataError, InputMissing, UsageError
from rdm_fast.evaluation import run as evaluation
from rdm_fast.evaluation.loaded_backbone import load_for_evaluation
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.evaluation.score import Result
from rdm_fast.models.backbone import build_backbone
from rdm_fast.models.pretrained import file_note
from rdm_fast.tools.export.write import export_checkpoint
from tests.random_run import save_random
from tests.spies import refused
from tests.tiny import tiny

CPU = torch.device("cpu")
STEP = "step-00000001"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights on digits, whose embeddings are useful all the same."""
    config = tiny(size=16)  # as the recipe that reads the file
    config = replace(config, model=replace(config.model, width=8))
    path = tmp_path_factory.mktemp("run") / "run"
    save_random(path, config)
    return path


@pytest.fixture(scope="module")
def weights(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same backbone, in a file."""
    out = tmp_path_factory.mktemp("weights") / "w.safetensors"
    export_checkpoint(run / "checkpoints" / STEP, "safetensors", out=out)
    return out


def evaluate(checkpoint: Path, **changes: Any) -> Result:
    options: dict[str, Any] = {"protocol": "closed-form"} | changes
    command = EvaluateCommand(checkpoint=str(checkpoint), **options)
    result = evaluation.evaluate(load_for_evaluation(command), command, CPU)
    assert result is not None
    return result


def test_a_file_gives_the_same_result_as_its_run(run: Path, weights: Path) -> None:
    of_run, of_file = evaluate(run), evaluate(weights, recipe="digits_byol")
    assert of_file == of_run and of_run.top1 > 60
    plain = json.loads((weights.parent / "w.safetensors-evaluation/w-closed-form.json").read_text())
    assert plain["top1"] == of_run.top1 and "effective_rank" not in plain
    whole = json.loads((run / "evaluation" / f"{STEP}-closed-form.json").read_text())
    assert whole["effective_rank"] > 1 and len(whole["eigenvalues"]) == 24


def test_other_weights_under_the_same_name_are_embedded_again(
    weights: Path, tmp_path: Path
) -> None:
    file, options = tmp_path / "w.safetensors", {"recipe": "digits_byol", "out": str(tmp_path)}
    tensors = load_file(weights)
    for scale in (1.0, -1.0):
        conv = "backbone.conv1.weight"
        save_file(tensors | {conv: scale * tensors[conv]}, file)
        found = evaluate(file, **options)
        assert evaluate(file, **options) == found
        if scale < 0:
            assert found != evaluate(weights, **options)


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
def test_features_are_written_for_other_programs(name: str, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / name
    evaluate(run, features_out=str(file), out=str(tmp_path / "o"))
    found: dict[str, Any] = dict(np.load(file)) if name == "f.npz" else dict(load_file(file))
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "train_features": (1400, 32), "train_labels": (1400,),
        "test_features": (397, 32), "test_labels": (397,),
    }  # fmt: skip
    cached = load_file(tmp_path / "o" / f"{STEP}-test.safetensors")
    assert np.array_equal(np.asarray(found["test_features"]), cached["features"].numpy())
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(CannotCreate) as error:
        evaluate(run, features_out=str(file))
    assert f"--features-out {file}" in str(error.value)


def test_a_probe_on_views_has_its_own_result(run: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"protocol": "reference-cifar", "out": str(tmp_path)}
    options |= {"epochs": 2, "lr": 10.0}
    plain, views = evaluate(run, **options), evaluate(run, augment=True, **options)
    assert evaluate(run, augment=True, **options) == views
    assert (plain.trained_on, views.trained_on) == ("features", "views")
    assert plain.top1 != views.top1 and (plain.epochs, plain.batch) == (2, 256)
    assert views.knn_top1 == plain.knn_top1  # of the same frozen backbone
    names = {file.name for file in tmp_path.glob("*.json")}
    assert names == {f"{STEP}-reference-cifar{end}.json" for end in ("", "-augmented")}


def test_fine_tuning_changes_the_backbone_and_no_cache(run: Path, tmp_path: Path) -> None:
    frozen = evaluate(run, out=str(tmp_path))
    cached = (tmp_path / f"{STEP}-test.safetensors").read_bytes()
    tuned = evaluate(run, protocol="auto", finetune=True, epochs=2, lr=0.1, out=str(tmp_path))
    assert tuned.protocol == "finetune" and tuned.lr == 0.1
    assert tuned.knn_top1 != frozen.knn_top1
    assert (tmp_path / f"{STEP}-test.safetensors").read_bytes() == cached
    assert evaluate(run, out=str(tmp_path)) == frozen


@pytest.mark.parametrize(
    ("options", "kind", "named"),
    [
        ({}, UsageError, "--recipe"),
        ({"recipe": "digits_byol", "arch": "resnet18"}, DataError, "resnet8"),
        ({"recipe": "digits_byol", "stem": "imagenet"}, UsageError, "--stem"),
        ({"recipe": "cifar10_byol"}, DataError, "1 channel"),
        ({"recipe": "digits_byol", "prefix": "net."}, DataError, "--prefix net."),
    ],
    ids=["no recipe", "arch", "stem", "channels", "prefix"],
)
def test_a_file_that_does_not_fit_is_an_error(
    options: dict[str, Any], kind: type[Exception], named: str, weights: Path
) -> None:
    with pytest.raises(kind) as error:
        evaluate(weights, **options)
    assert named in str(error.value)


def test_the_stem_of_a_file_is_assumed_aloud_and_can_be_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, _ = build_backbone(ModelConfig(backbone="resnet18"), 3)
    file = tmp_path / "x.pth"
    pad2 = file_note(Config(model=ModelConfig(stem="cifar_pad2")))
    for note, stem, line in (
        ({}, "auto", "--stem cifar,"),
        ({}, "cifar_pad2", None),
        (pad2, "auto", None),
        (pad2, "cifar", "--stem cifar_pad2, not cifar"),
    ):
        torch.save({"state_dict": backbone.state_dict(), **note}, file)
        options: dict[str, Any] = {"recipe": "cifar10_byol", "stem": stem}
        found = load_for_evaluation(EvaluateCommand(checkpoint=str(file), **options))
        printed = [text for text in capsys.readouterr().out.splitlines() if "warning: " in text]
        assert found.config.model.stem == ("cifar_pad2" if line is None else "cifar")
        assert len(printed) == (line is not None) and (line or "") in "".join(printed)


def test_paths_and_flags_that_do_not_fit_a_run_are_errors(run: Path) -> None:
    for options in ({"recipe": "digits_byol"}, {"arch": "resnet8"}, {"stem": "cifar"}):
        with pytest.raises(UsageError) as error:
            evaluate(run, **options)
        assert f"--{next(iter(options))}" in str(error.value)
    with pytest.raises(InputMissing):
        evaluate(run / "absent")
    with pytest.raises(CannotCreate) as unwritable:
        evaluate(run, out="/proc/x")
    assert "--out /proc/x" in str(unwritable.value)


def command(**options: Any) -> Callable[[], object]:
    return lambda: EvaluateCommand(checkpoint="x", **options).protocol_for("folder")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (command(finetune=True, protocol="closed-form"), "finetune"),
        (command(finetune=True, precision="fp16"), "fp16"),
        (command(layer_decay=0.5), "--layer-decay"),
        (command(features_out="x.pth"), "x.pth"),
        (command(epochs=-1), "epochs=-1"),
        (command(recipe="x"), "recipe=x"),
        (command(protocol="x"), "protocol=x"),
        (command(batch=0), "batch=0"),
        (command(device="tpu"), "device"),
        (command(protocol="closed-form", augment=True), "--augment"),
        (command(protocol="closed-form", epochs=3), "--epochs"),
        (command(protocol="sgd-sweep", lr=1.0), "--lr"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_options_are_errors_that_name_them(
    call: Callable[[], object], named: str
) -> None:
    with pytest.raises(UsageError) as error:
        call()
    assert named in str(error.value)


def test_the_protocol_depends_on_the_data_set_and_the_flags() -> None:
    def name(data: str, **options: Any) -> str:
        return EvaluateCommand(checkpoint="x", **options).protocol_for(data).name

    chosen = {data: name(data) for data in ("digits", "folder", "cifar10")}
    assert chosen == {"digits": "logistic", "folder": "closed-form", "cifar10": "reference-cifar"}
    assert name("digits", protocol="closed-form") == "closed-form"
    assert name("digits", augment=True) == "reference-cifar"
    options: dict[str, Any] = {"protocol": "reference-imagenet", "epochs": 3, "lr": 0.5}
    changed = EvaluateCommand(checkpoint="x", **options).protocol_for("folder")
    assert (changed.epochs, changed.lr) == (3, 0.5)


# ---- models of timm --------------------------------------------------------------------------

VIT = {"backbone": "timm/test_vit", "patch_size": 4}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a ViT of random weights."""
    config = tiny("digits_byol", size=16)
    path = tmp_path_factory.mktemp("vit") / "run"
    save_random(path, replace(config, model=replace(config.model, **VIT)))
    return path


def test_a_vit_gives_the_same_result_from_its_run_and_any_file(vit: Path, tmp_path: Path) -> None:
    of_run = evaluate(vit)
    assert of_run.top1 > 50
    checkpoint = vit / "checkpoints" / STEP / "model.safetensors"
    exported, bare = tmp_path / "x.safetensors", tmp_path / "bare.safetensors"
    export_checkpoint(vit / "checkpoints" / STEP, "timm", out=exported)
    save_file(load_file(exported), bare)  # without the note
    kept = {"recipe": "digits_byol", "out": str(tmp_path / "out")}
    for file, arch in ((checkpoint, "auto"), (exported, "auto"), (bare, VIT["backbone"])):
        assert evaluate(file, **kept, arch=arch) == of_run
    for wrong, named in (
        ({"patch_size": 8}, "--patch-size 4"),
        ({"arch": "timm/test_vit2"}, "timm/test_vit2"),
        ({"recipe": "cifar10_byol"}, "1 channel(s)"),
    ):
        with refused(DataError, named):
            evaluate(bare, **{**kept, "arch": VIT["backbone"], **wrong})  # type: ignore[arg-type]
    with refused(UsageError, "--stem"):
        evaluate(bare, **kept, arch=VIT["backbone"], stem="cifar_pad2")
    for flag in ({"patch_size": 4}, {"arch": VIT["backbone"]}):
        with refused(UsageError, "--patch-size" if "patch_size" in flag else "--arch"):
            evaluate(vit, **flag)
