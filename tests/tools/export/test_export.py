"""rdm export: the real programs load the files strictly and embed the same."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from rdm_fast.config import Config
from rdm_fast.config.recipes import RECIPES
from rdm_fast.data.loaders.evaluation import center_view
from rdm_fast.errors import CannotCreate, UsageError
from rdm_fast.methods import Method
from rdm_fast.models.pretrained import load_backbone, read_backbone
from rdm_fast.models.weight_files import METADATA
from rdm_fast.tools.export.targets import TARGETS, Target
from rdm_fast.tools.export.write import SUFFIXES, export_checkpoint
from tests.random_run import save_random
from tests.runs import rdm
from tests.spies import refused
from tests.tiny import tiny

STEP = 7


def config(recipe: str, **model: Any) -> Config:
    """A recipe with narrow heads."""
    made = RECIPES[recipe]()
    small = {"projector_hidden": 8, "projector_dim": 8, "predictor_hidden": 8}
    return replace(made, model=replace(made.model, **(small | model)))


RunOf = Callable[[Config], tuple[Path, Method]]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """The step folder of a run with this configuration, and its method; made once."""

    @functools.cache
    def made(config: Config) -> tuple[Path, Method]:
        return save_random(tmp_path_factory.mktemp("run") / "run", config, STEP)

    return made


def images(config: Config) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, config.augment.channels, 40, 40, generator=generator)


def run_instructions(file: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Run the one block of Python in the text beside a file, in the file's folder."""
    text = file.read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(file.parent)
    names: dict[str, Any] = {}
    exec(code, names)
    model: nn.Module = names["model"]
    return model.eval()


def require_same_embeddings(
    made: Config, method: Method, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(said[-1].removeprefix("how to load it: "))
    with torch.no_grad():
        expected = method.backbone(images(made))
        assert expected.abs().mean() > 0.1  # so that the tolerance of 1e-6 is strict
        found = run_instructions(file, monkeypatch)(images(made))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, msg=str(file))


RESNET18 = {
    "cifar": ("cifar10_simsiam", {"stem": "cifar"}),
    "cifar_pad2": ("cifar10_simsiam", {}),
    "cifar_no_relu": ("cifar10_simsiam", {"stem": "cifar_no_relu"}),
    "imagenet": ("imagenet100_simsiam", {}),
    "grey": ("digits_byol", {"backbone": "resnet18", "stem": "imagenet"}),
}
PREFIXES = {"simsiam": "module.encoder.", "solo": "backbone."}


@pytest.mark.parametrize("kind", RESNET18)
def test_every_target_loads_its_file_and_embeds_the_same(
    kind: str, run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, model = RESNET18[kind]
    made = config(recipe, **model)
    stem = made.model.stem
    step, method = run_of(made)
    said = {}
    for target in TARGETS:
        out = tmp_path / f"{target}{SUFFIXES[target][0]}"
        if target == "hf" and stem != "imagenet":
            with refused(UsageError, "--to timm"):
                export_checkpoint(step, target, out=out)
            continue
        lines = export_checkpoint(step, target, out=out)
        said[target] = "\n".join(lines)
        require_same_embeddings(made, method, lines, monkeypatch)
        file = out / "model.safetensors" if target == "hf" else out
        require_note(file, made, target)
        if target in PREFIXES:
            require_tensors_alone(out, PREFIXES[target])
    # A small stem, which a plain ResNet lacks, is in the lines that are printed.
    small = "model.maxpool = torch.nn.Identity()"
    assert (small in said["torchvision"]) == (stem != "imagenet")
    padding = {"imagenet": "", "cifar_pad2": "padding=2"}.get(stem, "padding=1")
    assert padding in said["torchvision"]
    assert ("model.relu" in said["torchvision"]) == (stem == "cifar_no_relu")
    assert ("note: main_lincls.py" in said["simsiam"]) == (stem != "imagenet")
    assert ("note: solo-learn" in said["solo"]) == (stem in ("cifar", "cifar_no_relu"))


@pytest.mark.parametrize(
    ("name", "patch_size"), [("test_vit", 8), ("test_convnext", 0), ("resnet18", 0)]
)
def test_a_model_of_timm_loads_strictly_in_timm_and_embeds_the_same(
    name: str, patch_size: int, run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config("digits_byol", backbone=f"timm/{name}", patch_size=patch_size)
    made = replace(made, augment=replace(made.augment, size=40))
    step, method = run_of(made)
    for target in TARGETS:
        out = tmp_path / f"{target}{SUFFIXES[target][0]}"
        if name != "resnet18" and target in ("torchvision", "simsiam", "solo"):
            with refused(UsageError, f"--to {target}", "--to timm"):
                export_checkpoint(step, target, out=out)
            continue
        require_same_embeddings(made, method, export_checkpoint(step, target, out=out), monkeypatch)
        found = read_backbone(out / "model.safetensors" if target == "hf" else out)
        assert found.settings["backbone"] == f"timm/{name}"
        assert found.settings["patch_size"] == patch_size
        assert (found.channels, found.sizes) == (1, (40,))


def require_tensors_alone(file: Path, prefix: str) -> None:
    """A pickle for main_lincls.py or main_linear.py: whatever is left must be the classifier."""
    content = torch.load(file, weights_only=True)
    assert set(content) == {"state_dict", METADATA} and len(content["state_dict"]) == 120
    assert all(name.startswith(prefix) for name in content["state_dict"])
    assert f"{prefix}fc.weight" not in content["state_dict"]
    assert all(type(value) is Tensor for value in content["state_dict"].values())


def require_note(file: Path, made: Config, target: Target) -> None:
    """Facts that weights do not contain, such as the padding of a small stem."""
    found = read_backbone(file)
    assert (found.stem, found.stem_source) == (made.model.stem, "")
    if target in PREFIXES:
        notes = json.loads(torch.load(file, weights_only=True)[METADATA])
    else:
        with safe_open(file, framework="pt") as opened:
            notes = json.loads(opened.metadata()[METADATA])
    size, channels = made.augment.size, made.augment.channels
    assert notes["input_size"] == [channels, size, size]
    assert (notes["step"], len(notes["mean"])) == (STEP, channels)


@pytest.mark.parametrize(
    ("size", "crop_pct"), [(32, 1.0), (96, 96 / 110), (224, 0.875), (443, 443 / 506)]
)
def test_timm_shows_images_as_evaluation_does(
    size: int, crop_pct: float, run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation shows the whole of views under 64 pixels, else 224 of 256."""
    data = pytest.importorskip("timm.data")
    made = config("imagenet100_simsiam")
    made = replace(made, augment=replace(made.augment, size=size, interpolation="bicubic"))
    step, _ = run_of(made)
    image = np.random.default_rng(1).integers(0, 256, (600, 520, 3), dtype=np.uint8)
    levels = torch.from_numpy(center_view(image, made.augment).copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(t)[:, None, None] for t in (made.augment.mean, made.augment.std))
    for target in ("hf", "timm"):
        out = tmp_path / f"{target}{SUFFIXES[target][0]}"
        export_checkpoint(step, target, out=out)
        text = out / "README.md" if target == "hf" else out.with_name(out.name + ".md")
        settings = data.resolve_model_data_config(run_instructions(text, monkeypatch))
        assert settings["crop_pct"] == pytest.approx(crop_pct, abs=1e-12)
        view = data.create_transform(**settings)(Image.fromarray(image))
        torch.testing.assert_close(view, (levels - mean) / std)


@pytest.mark.slow  # three ResNet-50
def test_a_resnet50_loads_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config("imagenet_rdm_simsiam")
    step, method = save_random(tmp_path / "run", made, STEP)
    for target in ("torchvision", "timm"):
        said = export_checkpoint(step, target)
        require_same_embeddings(made, method, said, monkeypatch)
        assert (tmp_path / f"run/export/step-0000000{STEP}-{target}.safetensors").exists()


def test_a_resnet8_is_exported_for_this_package_alone(run_of: RunOf, tmp_path: Path) -> None:
    made = tiny("digits_byol")
    step, method = run_of(made)
    file = tmp_path / "here.safetensors"
    export_checkpoint(step, "safetensors", out=file)
    with torch.no_grad():
        found = load_backbone(file)(images(made))
        torch.testing.assert_close(found, method.backbone(images(made)), atol=1e-6, rtol=0)
    with safe_open(file, framework="pt") as opened:
        assert {name.partition(".")[0] for name in opened.keys()} == {"backbone", "projector"}  # noqa: SIM118
    for target in set(TARGETS) - {"safetensors"}:
        with refused(UsageError, f"--to {target}", "--to safetensors"):
            export_checkpoint(step, target)


def test_an_existing_export_is_replaced_only_on_request(run_of: RunOf, tmp_path: Path) -> None:
    step, _ = run_of(tiny("digits_byol"))
    out = tmp_path / "x.safetensors"
    export_checkpoint(step, "safetensors", out=out)
    out.write_bytes(b"mine")
    with refused(CannotCreate, "--overwrite"):
        export_checkpoint(step, "safetensors", out=out)
    assert out.read_bytes() == b"mine"
    export_checkpoint(step, "safetensors", out=out, overwrite=True)
    assert read_backbone(out).width == 4


def test_an_impossible_out(run_of: RunOf) -> None:
    step, _ = run_of(config("cifar10_simsiam"))
    outs: dict[Target, str] = {"torchvision": "x.pth", "solo": "x", "timm": "/proc/x.safetensors"}
    for target, out in outs.items():
        with refused(CannotCreate if target == "timm" else UsageError, "--out"):
            export_checkpoint(step, target, out=Path(out))
    assert not (step.parents[1] / "export").exists()


def test_the_command_exports_the_newest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_random(tmp_path / "run", tiny("digits_byol"), STEP)
    for target, code in (("safetensors", 0), ("safetensors", 73), ("onnx", 2)):
        assert rdm("export", tmp_path / "run", "--to", target) == code
    out, err = capsys.readouterr()
    assert f"export/step-0000000{STEP}-safetensors.safetensors" in out
    assert err.startswith("error: ") and "--overwrite" in err
