"""Weights are found inside any known wrapper or table, what was taken is said, and none runs."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rdm_fast.config import ModelConfig
from rdm_fast.errors import DataError, UsageError
from rdm_fast.methods import build_method
from rdm_fast.models.backbone import build_backbone
from rdm_fast.models.layouts import TORCHVISION
from rdm_fast.models.pretrained import METADATA, load_backbone, read_backbone, warm_start
from tests.forks import call
from tests.tiny import command, tiny

State = dict[str, Tensor]
MODEL = ModelConfig(backbone="resnet8", width=4)


@pytest.fixture(scope="module")
def weights() -> State:
    torch.manual_seed(5)
    return dict(build_backbone(MODEL, 1)[0].state_dict())


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def in_sequential(state: State) -> State:
    place = {name: i for i, name in TORCHVISION.items()}
    parts = {name: name.partition(".") for name in state}
    return {f"{place[first]}.{rest}": state[name] for name, (first, _, rest) in parts.items()}


def require_equal(file: Path, expected: State, prefix: str | None = None) -> str:
    """The file's backbone is this one; returns what is said of it."""
    found = read_backbone(file, prefix)
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())
    return found.load_into(build_backbone(MODEL, 1)[0])


@pytest.mark.parametrize(
    "prefix",
    [
        *("encoder_q.", "_orig_mod.", "module._orig_mod.", "module.backbone.", "net."),
        *("online_encoder.net.", "model.module._orig_mod.backbone.", "_orig_mod.module.encoder."),
        *("student.backbone.", "model.encoder_q._fsdp_wrapped_module.", "module.module.module."),
    ],
)
def test_wrappers_are_peeled_off_and_said(prefix: str, weights: State, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save({"epoch": 3, "state_dict": under(prefix, weights)}, file)
    said = require_equal(file, weights)
    for part in prefix.rstrip(".").split("."):
        assert part in said
    require_equal(file, weights, prefix)  # as a user would write it
    save_file(under(prefix, weights), tmp_path / "x.safetensors")
    require_equal(tmp_path / "x.safetensors", weights)


@pytest.mark.parametrize(
    "prefix", ["", "backbone.", "module.", "_orig_mod.", "online_encoder.net."]
)
def test_a_bare_sequential_is_read_anywhere(prefix: str, weights: State, tmp_path: Path) -> None:
    torch.save(under(prefix, in_sequential(weights)), tmp_path / "x.pth")
    require_equal(tmp_path / "x.pth", weights)


def test_modules_compiled_one_by_one(weights: State, tmp_path: Path) -> None:
    state = {name.replace("layer1.", "layer1._orig_mod."): t for name, t in weights.items()}
    torch.save(under("backbone.", state), tmp_path / "x.pth")
    assert "_orig_mod" in require_equal(tmp_path / "x.pth", weights)


@pytest.mark.parametrize(
    "keys",
    [
        *(["student"], ["teacher"], ["net"], ["model_state_dict"], ["ema"], ["state_dict_ema"]),
        *(["ema", "module"], ["checkpoint", "model"], ["state", "net", "backbone"]),
    ],
    ids=".".join,
)
def test_weights_are_found_in_a_table_and_said(
    keys: list[str], weights: State, tmp_path: Path
) -> None:
    content: Any = under("module.", weights)
    for key in reversed(keys):
        content = {key: content, "step": 3}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "names": {"a": torch.ones(1)}}
    torch.save(content | {"optimizer": optimizer}, tmp_path / "x.pth")
    assert ".".join(keys) in require_equal(tmp_path / "x.pth", weights)


def test_of_dino_s_files_the_teacher_is_taken_and_swav_s_prototypes_are_left_out(
    weights: State, tmp_path: Path
) -> None:
    """As main_dino.py and main_swav.py save them, and lightly's example of DINO."""
    other = {n: t + 1 if t.is_floating_point() else t for n, t in weights.items()}
    head = {"head.last_layer.weight_v": torch.ones(5, 3)}
    dino = {
        "student": under("module.backbone.", other) | under("module.", head),
        "teacher": under("backbone.", weights) | head,
        "optimizer": {"state": {}},
        "epoch": 100,
        "dino_loss": {"center": torch.zeros(1, 5)},
    }
    torch.save(dino, tmp_path / "x.pth")
    said = require_equal(tmp_path / "x.pth", weights)
    assert "'teacher.backbone.'" in said and "'student.module.backbone.'" in said
    require_equal(tmp_path / "x.pth", other, "student.module.backbone.")
    heads = {"projection_head.0.weight": torch.ones(4, 4), "prototypes.weight": torch.ones(5, 4)}
    torch.save({"state_dict": under("module.", weights | heads)}, tmp_path / "x.pth")
    said = require_equal(tmp_path / "x.pth", weights)
    assert "prototypes 1" in said and "projection_head 1" in said
    flat = under("student_backbone.", other) | under("teacher_backbone.", weights)
    torch.save({"state_dict": flat}, tmp_path / "x.pth")
    assert "'student_backbone.'" in require_equal(tmp_path / "x.pth", weights)


def test_of_several_backbones_one_is_taken_and_the_others_are_said(
    weights: State, tmp_path: Path
) -> None:
    other = {n: t + 1 if t.is_floating_point() else t for n, t in weights.items()}
    both = {"student": under("backbone.", weights), "teacher": under("backbone.", other)}
    flat = {f"{k}.{n}": t for k, state in both.items() for n, t in state.items()}
    for content in (both, dict(reversed(both.items())), flat, {"state_dict": flat}):
        torch.save(content, tmp_path / "x.pth")
        said = require_equal(tmp_path / "x.pth", weights)
        assert "'student.backbone.'" in said and "'teacher.backbone.'" in said
        require_equal(tmp_path / "x.pth", other, "teacher.backbone.")
    torch.save({"model": weights, "model_ema": other}, tmp_path / "x.pth")
    said = require_equal(tmp_path / "x.pth", weights)
    assert "'model_ema.'" in said and "--prefix" in said
    require_equal(tmp_path / "x.pth", other, "model_ema.")


def test_a_table_that_holds_itself_ends(tmp_path: Path, weights: State) -> None:
    inner: dict[str, Any] = {"a": torch.ones(1)}
    for _ in range(40):  # each level doubles the paths to the last
        inner = {"a": inner, "b": inner}
    content: dict[str, Any] = {"x": inner, "net": weights}
    content["self"] = content
    torch.save(content, tmp_path / "x.pth")
    require_equal(tmp_path / "x.pth", weights)


# ---- the commands ----------------------------------------------------------------------------


def test_a_prefix_works_in_training_and_evaluation(weights: State, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save(under("trunk.left.", weights), file)
    flags = ["--init", "x.pth", "--epochs", "1", "--out", "run"]
    done = call("train.py", *command(), *flags, cwd=tmp_path)
    assert done.returncode == 65 and "--prefix 'trunk.left.'" in done.stderr
    done = call("train.py", *command(), *flags, "--prefix", "trunk.left.", cwd=tmp_path)
    assert done.returncode == 0 and "trunk.left." in done.stdout, done.stderr
    words = ["x.pth", "--recipe", "digits_byol", "--protocol", "closed-form"]
    done = call("eval_linear.py", *words, "--prefix", "trunk.left.", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_prefix_without_a_file_is_a_usage_error() -> None:
    with pytest.raises(UsageError) as error:
        ModelConfig(init_prefix="x.")
    assert "model.init_prefix" in str(error.value)


def test_a_warm_start_takes_the_prefix(weights: State, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    other = {n: t + 1 if t.is_floating_point() else t for n, t in weights.items()}
    torch.save({"student": weights, "teacher": other}, file)
    config = tiny()
    method = build_method(config)
    model = replace(config.model, init=str(file), init_prefix="teacher.")
    warm_start(method, replace(config, model=model))
    assert torch.equal(method.backbone.conv1.weight, other["conv1.weight"])  # type: ignore[union-attr]
    loaded = load_backbone(file, prefix="teacher.").state_dict()
    assert torch.equal(loaded["conv1.weight"], other["conv1.weight"])


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.to(torch.int64), "int64"),
        (lambda t: torch.full_like(t, float("nan")), "finite"),
        (lambda t: torch.full_like(t, -float("inf")), "finite"),
    ],
)
def test_weights_that_are_no_numbers_are_named(
    change: Any, named: str, weights: State, tmp_path: Path
) -> None:
    torch.save(weights | {"bn1.weight": change(weights["bn1.weight"])}, tmp_path / "x.pth")
    with pytest.raises(DataError) as error:
        load_backbone(tmp_path / "x.pth")
    assert "bn1.weight" in str(error.value) and named in str(error.value)


@pytest.mark.parametrize(
    "note", ["{", "[]", "3", '{"stem": 5}', '{"backbone": "resnet8"}', "[" * 9999]
)
def test_a_wrong_note_in_a_header_is_named(note: str, weights: State, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "x.safetensors", {METADATA: note})
    torch.save({"state_dict": weights, METADATA: note}, tmp_path / "x.pth")
    for path in tmp_path.iterdir():
        with pytest.raises(DataError) as error:
            read_backbone(path)
        assert str(path) in str(error.value) and METADATA in str(error.value)


@pytest.fixture
def hydra() -> Iterator[Any]:
    """A class under the name that a Lightning checkpoint of a Hydra program refers to."""
    package, module = ModuleType("omegaconf"), ModuleType("omegaconf.dictconfig")

    class DictConfig:
        def __init__(self) -> None:
            self._content = {"lr": 0.1}

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    module.DictConfig = DictConfig  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in ("omegaconf", "omegaconf.dictconfig")}
    sys.modules |= {"omegaconf": package, "omegaconf.dictconfig": module}
    yield DictConfig
    for name, old in before.items():
        sys.modules.pop(name)
        if old is not None:
            sys.modules[name] = old


@pytest.mark.parametrize("legacy", [False, True])
def test_a_lightning_checkpoint_with_hydra_objects_names_them_and_the_line_that_converts_it(
    hydra: Any, legacy: bool, weights: State, tmp_path: Path
) -> None:
    """The keys of a Lightning checkpoint, as its Trainer.save_checkpoint writes them."""
    file = tmp_path / "last.ckpt"
    content = {
        "epoch": 9, "global_step": 90, "pytorch-lightning_version": "2.6.0",
        "state_dict": under("model.", weights), "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {}, "optimizer_states": [], "lr_schedulers": [],
        "hparams_name": "cfg", "hyper_parameters": hydra(),
    }  # fmt: skip
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DataError) as error:
        read_backbone(file)
    text = str(error.value)
    assert "omegaconf.dictconfig.DictConfig" in text and str(file) in text
    code = text.partition('python -c "')[2].removesuffix('"')
    exec(code, {})
    require_equal(tmp_path / "last.weights.pth", weights)
