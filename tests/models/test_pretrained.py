"""rdm_fast.models.pretrained: files in other trainers' layouts, by their documented key names."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet18, resnet34, resnet50, resnet101

from rdm_fast.config import ModelConfig
from rdm_fast.errors import DataError, InputMissing, Interrupted
from rdm_fast.methods import build_method
from rdm_fast.models.backbone import build_backbone
from rdm_fast.models.pretrained import LAYOUTS, load_backbone, read_backbone, warm_start
from rdm_fast.run import checkpoint
from rdm_fast.run.folder import read_config
from rdm_fast.training.trainer import Trainer
from tests.runs import Hooked, final_state, newest, run
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


def lightly(model: nn.Module) -> State:
    """Its examples: backbone = nn.Sequential(*list(resnet.children())[:-1])."""
    backbone = nn.Sequential(*list(model.children())[:-1])
    head = linear("projection_head.layers.0") | linear("prediction_head.layers.0")
    return under("backbone.", dict(backbone.state_dict())) | head


FILES: dict[str, tuple[Callable[[nn.Module], State], dict[str, int]]] = {
    "SimSiam": (simsiam, {"fc": 5, "predictor": 2}),
    "MoCo": (moco, {"fc": 2, "encoder_k": 120, "queue": 1, "queue_ptr": 1}),
    "solo-learn": (solo, {"momentum_backbone": 120, "classifier": 2, "projector": 2}),
    "lightly": (lightly, {"projection_head": 2, "prediction_head": 2}),
    "torchvision": (lambda model: dict(model.state_dict()), {"fc": 2}),
    "DataParallel": (lambda model: under("module.", dict(model.state_dict())), {"fc": 2}),
    "MoCo v3": (lambda model: under("module.base_encoder.", body(model)), {}),
    "old solo-learn": (lambda model: under("encoder.", body(model)), {}),
}


@pytest.mark.parametrize("name", FILES)
def test_each_layout_is_found_loaded_and_counted(
    name: str, model: nn.Module, tmp_path: Path
) -> None:
    state, ignored = FILES[name][0](model), FILES[name][1]
    torch.save({"epoch": 5, "arch": "resnet18", "state_dict": state}, tmp_path / "x.pth")
    found = read_backbone(tmp_path / "x.pth")
    assert (found.layout.name, found.backbone, found.stem) == (name, "resnet18", "imagenet")
    assert (found.channels, found.ignored) == (3, ignored)
    assert set(FILES) == set(LAYOUTS)
    backbone, _ = build_backbone(RESNET18, 3)
    said = found.load_into(backbone)
    total = sum(ignored.values())
    assert f"{name} layout, loaded 120 of 120 tensors" in said
    assert (f"; ignored {total}: " in said) == (total > 0)
    images = torch.randn(2, 3, 64, 64)
    model.fc, fc = nn.Identity(), model.fc
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval()(images), model(images), atol=1e-6, rtol=0)
    model.fc = fc


def test_safetensors_and_a_bare_table_are_read_alike(model: nn.Module, tmp_path: Path) -> None:
    save_file(dict(model.state_dict()), tmp_path / "x.safetensors")
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    torch.save({"model": model.state_dict(), "lr": 0.1}, tmp_path / "table.pth")
    for file in tmp_path.iterdir():
        found = read_backbone(file)
        assert len(found.tensors) == 120 and found.ignored == {"fc": 2}


def test_the_real_resnet_of_lightlys_examples_is_one_of_them(tmp_path: Path) -> None:
    modules = pytest.importorskip("lightly.models.modules")
    whole = nn.Module()
    whole.backbone = nn.Sequential(*list(resnet18(weights=None).children())[:-1])
    whole.projection_head = modules.SimSiamProjectionHead(512, 512, 128)
    torch.save(whole.state_dict(), tmp_path / "x.pth")
    found = read_backbone(tmp_path / "x.pth")
    assert found.layout.name == "lightly" and len(found.tensors) == 120


@pytest.mark.parametrize(
    ("prefix", "nearest"),
    [("net.online.encoder.", "old solo-learn"), ("teacher.backbone.", "solo-learn")],
)
def test_a_wrong_prefix_is_refused_with_counts_and_the_nearest_layout(
    prefix: str, nearest: str, model: nn.Module, tmp_path: Path
) -> None:
    torch.save(under(prefix, body(model)) | linear("head"), tmp_path / "x.pth")
    near = LAYOUTS[nearest].prefix
    expected = (
        f"none of its 122 tensors is a ResNet's under a known prefix, but 120 begin with "
        f"'{prefix}' and are (nearest layout: {nearest}, '{near}'): use --prefix '{prefix}'"
    )
    with pytest.raises(DataError, match=re.escape(expected)):
        read_backbone(tmp_path / "x.pth")
    assert len(read_backbone(tmp_path / "x.pth", prefix).tensors) == 120
    with pytest.raises(DataError, match=f"120 of its 122 tensors begin with --prefix {prefix[:3]}"):
        read_backbone(tmp_path / "x.pth", prefix[:3])


def test_tensors_that_are_no_resnet_are_named(tmp_path: Path) -> None:
    torch.save(linear("blocks.0.attn.qkv"), tmp_path / "x.pth")
    with pytest.raises(DataError, match=r"none of its 2 tensors .*they are blocks\.0\.attn\.qkv"):
        read_backbone(tmp_path / "x.pth")


@pytest.mark.parametrize("stem", ["imagenet", "cifar", "cifar_pad2"])
def test_another_stem_is_told_in_a_sentence(stem: str, tmp_path: Path) -> None:
    backbone, _ = build_backbone(replace(RESNET18, stem=stem), 3)  # type: ignore[arg-type]
    torch.save(backbone.state_dict(), tmp_path / "x.pth")
    found = read_backbone(tmp_path / "x.pth")
    for other in ("imagenet", "cifar", "cifar_pad2"):
        asked = replace(RESNET18, stem=other)  # type: ignore[arg-type]
        if (stem == "imagenet") == (other == "imagenet"):
            found.require(asked, 3)  # the two small ones have weights of one shape
            continue
        is_large = stem == "imagenet"
        sizes = ("7x7", "3x3") if is_large else ("3x3", "7x7")
        use = "imagenet" if is_large else "cifar"
        with pytest.raises(
            DataError,
            match=f"first convolution of .* is {sizes[0]} .*the model's is {sizes[1]} .*"
            f"use --model.stem {use}",
        ):
            found.require(asked, 3)


def test_solo_learns_small_stem_is_padded_by_two(tmp_path: Path) -> None:
    backbone, _ = build_backbone(replace(RESNET18, stem="cifar_pad2"), 3)
    for prefix, stem in (("backbone.", "cifar_pad2"), ("module.encoder.", "cifar")):
        torch.save(under(prefix, dict(backbone.state_dict())), tmp_path / "x.pth")
        assert read_backbone(tmp_path / "x.pth").stem == stem


def test_another_network_or_number_of_channels_is_told(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "x.pth")
    found = read_backbone(tmp_path / "x.pth")
    with pytest.raises(DataError, match="is a resnet18 and the model a resnet50: use --arch resn"):
        found.require(replace(RESNET18, backbone="resnet50"), 3)
    with pytest.raises(DataError, match=r"images of 3 channel\(s\), and these have 1"):
        found.require(RESNET18, 1)


def hollow(model: nn.Module) -> State:
    """A state of the right names and shapes that takes no room in a file."""
    return {
        k: torch.zeros((), dtype=t.dtype).expand(t.shape) for k, t in model.state_dict().items()
    }


@pytest.mark.parametrize("make", [resnet34, resnet50, resnet101])
def test_the_depth_is_read_from_the_names(make: Callable[..., nn.Module], tmp_path: Path) -> None:
    with torch.device("meta"):
        model = make(weights=None)
    torch.save(hollow(model), tmp_path / "x.pth")
    if make is resnet101:
        with pytest.raises(DataError, match="has 3-4-23-3 bottlenecks in its stages, which is no"):
            read_backbone(tmp_path / "x.pth")
    else:
        found = read_backbone(tmp_path / "x.pth")
        assert found.backbone == make.__name__
        if make is resnet50:
            backbone, _ = build_backbone(replace(RESNET18, backbone="resnet50"), 3)
            assert "loaded 318 of 318 tensors" in found.load_into(backbone)


def test_a_missing_or_foreign_tensor_is_counted_and_nothing_is_loaded(
    model: nn.Module, tmp_path: Path
) -> None:
    state = under("module.encoder.", body(model))
    del state["module.encoder.layer4.1.bn2.weight"]
    state["module.encoder.layer1.0.se.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "x.pth")
    backbone, _ = build_backbone(RESNET18, 3)
    before = backbone.conv1.weight.clone()
    with pytest.raises(DataError, match=r"119 of this model's 120 tensors match, 1 missing \(laye"):
        read_backbone(tmp_path / "x.pth").load_into(backbone)
    assert torch.equal(backbone.conv1.weight, before)


def test_an_old_file_without_batch_counters_is_loaded_and_says_so(
    model: nn.Module, tmp_path: Path
) -> None:
    state = {k: t for k, t in body(model).items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "x.pth")
    backbone, _ = build_backbone(RESNET18, 3)
    said = read_backbone(tmp_path / "x.pth").load_into(backbone)
    assert "loaded 100 of 120 tensors (20 batch counters, absent in old files, are 0)" in said
    for whole, gone in ((state, "bn1.running_mean"), (body(model), "bn1.num_batches_tracked")):
        del whole[gone]
        torch.save(whole, tmp_path / "x.pth")
        with pytest.raises(DataError, match=rf"1 missing \({gone}\)"):
            read_backbone(tmp_path / "x.pth").load_into(backbone)


class Payload:
    """Runs a command when it is unpickled by someone who trusts it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hyper": Payload(tmp_path / "mark")}, tmp_path / "x.pth")
    with pytest.raises(DataError, match=r"x\.pth cannot be read as data alone .*save its tensors"):
        read_backbone(tmp_path / "x.pth")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_file_of_noise_or_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="there is no file"):
        read_backbone(tmp_path / name)
    (tmp_path / name).write_bytes(b"not a checkpoint, but long enough to be taken for one")
    with pytest.raises(DataError, match=name):
        read_backbone(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError, match="holds a list, not tensors by name"):
        read_backbone(tmp_path / "list.pth")


# ---- warm start ------------------------------------------------------------------------------


def start_file(path: Path, width: int = 4) -> Path:
    """A ResNet-8 as SimSiam would have saved it."""
    model = replace(tiny().model, width=width)
    torch.manual_seed(9)
    backbone, _ = build_backbone(model, 1)
    torch.save({"state_dict": under("module.encoder.", dict(backbone.state_dict()))}, path)
    return path


def with_init(file: Path, recipe: str = "digits_rdm_simsiam") -> Any:
    config = tiny(recipe)
    return replace(config, model=replace(config.model, init=str(file)))


@pytest.mark.parametrize("recipe", ["digits_rdm_simsiam", "digits_byol"])
def test_a_run_begins_with_the_files_backbone_and_goes_on_without_it(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = start_file(tmp_path / "x.pth")
    config = with_init(file, recipe)
    method = build_method(config)
    warm_start(method, config.model, 1)
    expected = load_backbone(file).state_dict()
    for name in ("backbone", "target_backbone") if "byol" in recipe else ("backbone",):
        for key, tensor in getattr(method, name).state_dict().items():
            assert torch.equal(tensor, expected[key]), (name, key)
    assert "SimSiam layout, loaded" in capsys.readouterr().out

    run(tmp_path / "whole", config)
    run(tmp_path / "other", replace(config, model=replace(config.model, init="")))
    assert final_state(tmp_path / "whole") != final_state(tmp_path / "other")
    assert read_config(tmp_path / "whole").model.init == str(file)
    assert "warm start: " in capsys.readouterr().out

    def stop_after_3(trainer: Trainer) -> None:
        def after(_: object, number: int) -> None:
            if number == 2:
                trainer.ask_to_stop()

        trainer.train_step = Hooked(trainer.train_step, after=after)  # type: ignore[assignment]

    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", config, stop_after_3)
    file.unlink()
    run(tmp_path / "stopped", config)
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")
    assert checkpoint.load(newest(tmp_path / "stopped")).step == 8


def test_a_run_does_not_begin_with_another_backbone(tmp_path: Path) -> None:
    config = with_init(start_file(tmp_path / "x.pth", width=6))
    with pytest.raises(DataError, match="6, 1, 3, 3"):
        run(tmp_path / "run", config)
    with pytest.raises(InputMissing, match="there is no file"):
        run(tmp_path / "none", with_init(tmp_path / "absent.pth"))
