"""models.pretrained: files in other trainers' layouts, by their documented key names."""

import json
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet18, resnet34, resnet50, resnet101

from rdm_fast.config import Config, ModelConfig, Stem
from rdm_fast.errors import DataError, InputMissing
from rdm_fast.methods import build_method
from rdm_fast.models.backbone import build_backbone
from rdm_fast.models.layouts import LAYOUTS
from rdm_fast.models.pretrained import (
    file_note,
    load_backbone,
    load_strict,
    read_backbone,
    warm_start,
)
from rdm_fast.models.weight_files import METADATA
from rdm_fast.run import checkpoint
from rdm_fast.run.folder import read_config
from tests.runs import final_state, run, run_with_stops
from tests.tiny import tiny

State = dict[str, Tensor]
RESNET18 = ModelConfig(backbone="resnet18", stem="imagenet")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """torchvision's own ResNet-18, with statistics that are not all 0 and 1."""
    torch.manual_seed(3)
    made = resnet18(weights=None)
    made(torch.randn(8, 3, 64, 64))
    return made.eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.pth"


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def linear(name: str, *more: str) -> State:
    return {f"{name}.{part}": torch.zeros(2) for part in ("weight", "bias", *more)}


def body(model: nn.Module) -> State:
    """Without torchvision's own classifier."""
    return {name: t for name, t in model.state_dict().items() if not name.startswith("fc.")}


def simsiam(model: nn.Module) -> State:
    """main_simsiam.py: the projector takes fc's place, and DDP adds `module.`."""
    projector = under("module.encoder.", linear("fc.0") | linear("fc.1", "running_mean"))
    return under("module.encoder.", body(model)) | projector | linear("module.predictor.0")


def moco(model: nn.Module) -> State:
    """main_moco.py: a query encoder, a key encoder and a queue."""
    query = under("module.encoder_q.", body(model) | linear("fc.0"))
    key = under("module.encoder_k.", {name: t * 0 for name, t in body(model).items()})
    return query | key | {"module.queue": torch.zeros(2), "module.queue_ptr": torch.zeros(1)}


def solo(model: nn.Module) -> State:
    """main_pretrain.py: online classifier, projector, and the target's momentum_ twins."""
    momentum = under("momentum_backbone.", {name: t * 0 for name, t in body(model).items()})
    return under("backbone.", body(model)) | momentum | linear("classifier") | linear("projector.0")


def mmpretrain(model: nn.Module) -> State:
    """mmpretrain/models: ImageClassifier of ResNet_CIFAR, GlobalAveragePooling, LinearClsHead."""
    return under("backbone.", body(model)) | linear("head.fc")


def mmpretrain_simclr(model: nn.Module) -> State:
    """Its SimCLR of NonLinearNeck and ContrastiveHead, which has no tensors."""
    return under("backbone.", body(model)) | linear("neck.fc0") | linear("neck.fc1")


def generator(model: nn.Module) -> State:
    """lightly's ResNetGenerator: no modules for ReLU and max-pool, and `shortcut`s."""
    parts = [getattr(model, n) for n in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")]
    state = nn.Sequential(*parts).state_dict()
    return {f"backbone.{n}".replace("downsample", "shortcut"): t for n, t in state.items()}


def lightly(model: nn.Module) -> State:
    """Its examples: backbone = nn.Sequential(*list(resnet.children())[:-1])."""
    backbone = nn.Sequential(*list(model.children())[:-1])
    head = linear("projection_head.layers.0") | linear("prediction_head.layers.0")
    return under("backbone.", dict(backbone.state_dict())) | head


def bare(state: State) -> State:
    return {name.removeprefix("backbone."): tensor for name, tensor in state.items()}


FILES: dict[str, tuple[Callable[[nn.Module], State], dict[str, int]]] = {
    "SimSiam": (simsiam, {"fc": 5, "predictor": 2}),
    "MoCo": (moco, {"fc": 2, "encoder_k": 120, "queue": 1, "queue_ptr": 1}),
    "MMPretrain": (mmpretrain, {"head": 2}),
    "plain backbone": (lambda model: under("backbone.", body(model)), {}),
    "plain encoder": (lambda model: under("encoder.", body(model)), {}),
    "lightly ResNetGenerator": (generator, {}),
    "solo-learn": (solo, {"momentum_backbone": 120, "classifier": 2, "projector": 2}),
    "lightly": (lightly, {"projection_head": 2, "prediction_head": 2}),
    "torchvision": (lambda model: dict(model.state_dict()), {"fc": 2}),
    "DataParallel": (lambda model: under("module.", dict(model.state_dict())), {"fc": 2}),
    "MoCo v3": (lambda model: under("module.base_encoder.", body(model)), {}),
    "old solo-learn": (
        lambda model: under("encoder.", body(model)) | linear("classifier"),
        {"classifier": 2},
    ),
    "nn.Sequential of a ResNetGenerator": (lambda model: bare(generator(model)), {}),
    "nn.Sequential": (
        lambda model: dict(nn.Sequential(*list(model.children())[:-1]).state_dict()),
        {},
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_each_layout_is_found_loaded_and_counted(name: str, model: nn.Module, file: Path) -> None:
    state, ignored = FILES[name][0](model), FILES[name][1]
    torch.save({"epoch": 5, "arch": "resnet18", "state_dict": state}, file)
    found = read_backbone(file)
    assert (found.layout.name, found.backbone, found.stem) == (name, "resnet18", "imagenet")
    assert (found.channels, found.ignored) == (3, ignored)
    backbone, _ = build_backbone(RESNET18, 3)
    said = found.load_into(backbone)
    assert "120 of 120" in said and (f"ignored {sum(ignored.values())}" in said) == bool(ignored)
    loaded = backbone.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in body(model).items())


def test_every_layout_has_a_file() -> None:
    assert set(FILES) == set(LAYOUTS)


def test_safetensors_and_plain_tables_read_alike(model: nn.Module, tmp_path: Path) -> None:
    save_file(dict(model.state_dict()), tmp_path / "x.safetensors")
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    torch.save({"model": model.state_dict(), "lr": 0.1}, tmp_path / "table.pth")
    for path in tmp_path.iterdir():
        found = read_backbone(path)
        assert len(found.tensors) == 120 and found.ignored == {"fc": 2}


def test_the_model_of_lightlys_examples_is_in_its_layout(file: Path) -> None:
    modules = pytest.importorskip("lightly.models.modules")
    whole = nn.Module()
    whole.backbone = nn.Sequential(*list(resnet18(weights=None).children())[:-1])
    whole.projection_head = modules.SimSiamProjectionHead(512, 512, 128)
    torch.save(whole.state_dict(), file)
    found = read_backbone(file)
    assert found.layout.name == "lightly" and len(found.tensors) == 120


@pytest.mark.parametrize(
    ("prefix", "nearest"),
    [("trunk.left.encoder.", "old solo-learn"), ("trunk.left.backbone.", "solo-learn")],
)
def test_an_unknown_prefix_is_named_with_the_nearest_layout(
    prefix: str, nearest: str, model: nn.Module, file: Path
) -> None:
    torch.save(under(prefix, body(model)) | linear("head"), file)
    with pytest.raises(DataError) as error:
        read_backbone(file)
    for part in ("122", "120", f"{nearest}, '{LAYOUTS[nearest].prefix}'", f"--prefix '{prefix}'"):
        assert part in str(error.value)
    assert len(read_backbone(file, prefix).tensors) == 120
    with pytest.raises(DataError) as error:
        read_backbone(file, prefix[:3])
    assert f"120 of its 122 tensors begin with --prefix {prefix[:3]}" in str(error.value)


def test_tensors_that_are_no_resnet_are_named(file: Path) -> None:
    torch.save(linear("blocks.0.attn.qkv"), file)
    with pytest.raises(DataError) as error:
        read_backbone(file)
    assert "blocks.0.attn.qkv.weight" in str(error.value)


@pytest.mark.parametrize("stem", get_args(Stem))
def test_another_stem_is_refused(stem: str, file: Path) -> None:
    backbone, _ = build_backbone(replace(RESNET18, stem=stem), 3)  # type: ignore[arg-type]
    torch.save(backbone.state_dict(), file)
    found = read_backbone(file)
    for other in get_args(Stem):
        asked = replace(RESNET18, stem=other)  # type: ignore[arg-type]
        if (stem == "imagenet") == (other == "imagenet"):
            found.require(asked, 3)  # the small stems have weights of one shape
        else:
            with pytest.raises(DataError) as error:
                found.require(asked, 3, stem_flag="--stem")
            assert str(error.value).endswith(f"--stem {found.stem}")


# ---- small stems -----------------------------------------------------------------------------


def settled(model: nn.Module) -> nn.Module:
    """With the statistics of a batch."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32))
    return model


def small(padding: int, *, has_relu: bool = True) -> nn.Module:
    """torchvision's ResNet-18 with the changes that solo-learn, MMPretrain and others make."""
    torch.manual_seed(3)
    model = resnet18(weights=None)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=padding, bias=False)
    model.maxpool, model.fc = nn.Identity(), nn.Identity()
    model.relu = nn.ReLU() if has_relu else nn.Identity()
    return settled(model)


def require_equal_features(file: Path, model: nn.Module, atol: float = 1e-6) -> None:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.eval()(images).flatten(1)
        found = load_backbone(file)(images)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("stem", "padding", "has_relu"),
    [("cifar", 1, True), ("cifar_pad2", 2, True), ("cifar_no_relu", 1, False)],
)
def test_a_checkpoints_weights_embed_as_their_stem_did(
    stem: Stem, padding: int, has_relu: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = small(padding, has_relu=has_relu)
    state = under("backbone.", dict(model.state_dict())) | linear("projector.0")
    note = file_note(Config(model=replace(RESNET18, stem=stem)))
    step = checkpoint.save(tmp_path, checkpoint.Snapshot(1, state, {}, {}, {}), 2, note)
    require_equal_features(step / "model.safetensors", model)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("trainer", "padding", "sure"),
    [
        (solo, 2, "which is solo-learn's"),
        (mmpretrain, 1, "which is MMPretrain's"),
        (mmpretrain_simclr, 1, "which is MMPretrain's"),
        (body, 1, "which is an assumption"),
    ],
)
def test_another_trainers_small_stem_is_named(
    trainer: Callable[[nn.Module], State], padding: int, sure: str, file: Path
) -> None:
    model = small(padding)
    torch.save({"meta": {"epoch": 3}, "state_dict": trainer(model)}, file)
    with pytest.warns(UserWarning) as record:
        require_equal_features(file, model)
    (warning,) = record
    assert sure in str(warning.message) and str(file) in str(warning.message)
    with torch.no_grad():  # another stem on request, without a warning
        other = load_backbone(file, stem="cifar" if padding == 2 else "cifar_pad2")
        images = torch.randn(1, 3, 32, 32)
        assert (other(images) - model.eval()(images)).abs().max() > 0.01


def test_the_stem_of_a_7_by_7_file_cannot_be_chosen(model: nn.Module, file: Path) -> None:
    torch.save(model.state_dict(), file)
    with pytest.raises(DataError) as error:
        load_backbone(file, stem="cifar")
    assert "stem imagenet" in str(error.value)


@pytest.mark.parametrize(
    ("stem", "said"), [("cifar", "--model.stem cifar_pad2, not cifar"), ("cifar_pad2", "")]
)
def test_a_warm_start_warns_of_another_padding(
    stem: Stem, said: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = file_note(Config(model=replace(RESNET18, stem="cifar_pad2")))
    torch.save({"state_dict": body(small(2)), **note}, file)
    method = nn.Module()
    method.backbone, _ = build_backbone(config := replace(RESNET18, stem=stem, init=str(file)), 3)
    warm_start(method, Config(model=config))
    out = capsys.readouterr().out
    assert ("warning: " in out) == bool(said) and said in out


# ---- lightly's own ResNet ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "splits"), [("resnet-18", 0), ("resnet-18", 4), ("resnet-50", 0)])
def test_the_backbone_of_lightlys_cifar_examples_embeds_as_it_does(
    name: str, splits: int, file: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """nn.Sequential(*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1)), and MoCo's splits."""
    models = pytest.importorskip("lightly.models")
    torch.manual_seed(4)
    resnet = models.ResNetGenerator(name, num_splits=splits)
    whole = nn.Module()
    whole.backbone = nn.Sequential(*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1))
    whole.projection_head = models.modules.SimSiamProjectionHead(8, 8, 8)
    settled(whole.backbone)
    torch.save({"state_dict": whole.state_dict()}, file)
    assert read_backbone(file).stem == "cifar_no_relu"
    require_equal_features(file, whole.backbone, atol=1e-5)
    assert not recwarn.list


def test_lightlys_whole_resnet_embeds_as_it_does(file: Path) -> None:
    """Its own forward has the ReLU that its children lack."""
    models = pytest.importorskip("lightly.models")
    torch.manual_seed(4)
    resnet = settled(models.ResNetGenerator("resnet-18"))
    torch.save(resnet.state_dict(), file)
    resnet.linear = nn.Identity()
    with pytest.warns(UserWarning):
        require_equal_features(file, resnet, atol=1e-5)


def test_another_network_or_number_of_channels_is_refused(model: nn.Module, file: Path) -> None:
    torch.save(model.state_dict(), file)
    found = read_backbone(file)
    with pytest.raises(DataError) as error:
        found.require(replace(RESNET18, backbone="resnet50"), 3)
    assert "--arch resnet18" in str(error.value)
    with pytest.raises(DataError):
        found.require(RESNET18, 1)


@pytest.mark.parametrize("make", [resnet34, resnet50, resnet101])
def test_the_depth_is_read_from_the_names(make: Callable[..., nn.Module], file: Path) -> None:
    with torch.device("meta"):
        model = make(weights=None)
    hollow = {  # the right names and shapes, without the bytes
        k: torch.zeros((), dtype=t.dtype).expand(t.shape) for k, t in model.state_dict().items()
    }
    torch.save(hollow, file)
    if make is resnet101:
        with pytest.raises(DataError) as error:
            read_backbone(file)
        assert "3-4-23-3" in str(error.value)
    else:
        assert read_backbone(file).backbone == make.__name__


def test_batch_counters_may_be_absent_all_together(model: nn.Module, file: Path) -> None:
    """Files from before torch 0.4.1 have none; any other missing tensor is an error."""
    state = {k: t for k, t in body(model).items() if not k.endswith("num_batches_tracked")}
    torch.save(state, file)
    backbone, _ = build_backbone(RESNET18, 3)
    assert "100 of 120" in read_backbone(file).load_into(backbone)
    for whole, gone in ((state, "bn1.running_mean"), (body(model), "bn1.num_batches_tracked")):
        del whole[gone]
        torch.save(whole, file)
        with pytest.raises(DataError) as error:
            read_backbone(file).load_into(backbone)
        assert gone in str(error.value)


def test_loading_is_strict_and_changes_nothing_on_failure() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    state = {name: t + 1 for name, t in before.items()}
    wrong = state | {"1.bias": torch.zeros(5), "extra.a": torch.zeros(1)}
    del wrong["0.bias"]
    with pytest.raises(DataError) as error:
        load_strict(module, wrong, "checkpoint c")
    for part in ("checkpoint c", "5 of this model's 7", "0.bias", "extra.a", "[5] instead of [4]"):
        assert part in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert load_strict(module, state, "x") == 7
    assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())


class Payload:
    """Runs a command when it is unpickled by someone who trusts it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, file: Path) -> None:
    for payload, name in (
        (Payload(tmp_path / "mark"), "posix.mkdir;"),
        (Namespace(), "argparse.Namespace;"),  # torch's text on it has terminal codes
    ):
        torch.save({"state_dict": {}, "hyper": payload}, file)
        with pytest.raises(DataError) as error:
            read_backbone(file)
        assert str(file) in str(error.value) and name in str(error.value)
        assert "x1b" not in str(error.value) and "torch.save(" in str(error.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_missing_or_meaningless_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        read_backbone(tmp_path / name)
    (tmp_path / name).write_bytes(b"not a checkpoint, but long enough to be taken for one")
    with pytest.raises(DataError) as error:
        read_backbone(tmp_path / name)
    assert name in str(error.value) and "weights_only" not in str(error.value)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError):
        read_backbone(tmp_path / "list.pth")


# ---- warm start ------------------------------------------------------------------------------


def with_init(path: Path, recipe: str = "digits_rdm_simsiam", width: int = 4) -> Any:
    """A run that begins with a ResNet-8 saved as SimSiam would have."""
    config = tiny(recipe)
    torch.manual_seed(9)
    backbone, _ = build_backbone(replace(config.model, width=width), 1)
    torch.save({"state_dict": under("module.encoder.", dict(backbone.state_dict()))}, path)
    return replace(config, model=replace(config.model, init=str(path)))


@pytest.mark.parametrize("recipe", ["digits_rdm_simsiam", "digits_byol"])
def test_warm_start_fills_the_backbone_and_the_targets(recipe: str, file: Path) -> None:
    config = with_init(file, recipe)
    method = build_method(config)
    warm_start(method, config)
    expected = load_backbone(str(file)).state_dict()
    for name in ("backbone", "target_backbone") if "byol" in recipe else ("backbone",):
        for key, tensor in getattr(method, name).state_dict().items():
            assert torch.equal(tensor, expected[key]), (name, key)


def test_a_resumed_run_needs_the_initial_file_no_more(file: Path, tmp_path: Path) -> None:
    config = with_init(file)
    run(tmp_path / "whole", config)
    run(tmp_path / "other", replace(config, model=replace(config.model, init="")))
    assert final_state(tmp_path / "whole") != final_state(tmp_path / "other")
    assert read_config(tmp_path / "whole").model.init == str(file)
    (weights,) = sorted(tmp_path.glob("whole/checkpoints/step-*/model.safetensors"))[-1:]
    with safe_open(weights, framework="pt") as opened:
        note = {"backbone": "resnet8", "stem": "cifar", "input_size": [1, 8, 8]}
        assert json.loads(opened.metadata()[METADATA]) == note
    run_with_stops(tmp_path / "stopped", config, [3, 4])
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")


def test_a_run_does_not_begin_with_another_backbone(file: Path, tmp_path: Path) -> None:
    config = with_init(file, width=6)
    with pytest.raises(DataError):
        run(tmp_path / "run", config)
    file.unlink()
    with pytest.raises(InputMissing):
        run(tmp_path / "none", config)
