"""export: what is written loads strictly into the real programs and embeds the same."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from rdm_fast.cli import commands as cli
from rdm_fast.config import Config
from rdm_fast.config.recipes import RECIPES
from rdm_fast.errors import CannotCreate, UsageError
from rdm_fast.methods import Method, build_method
from rdm_fast.models.pretrained import METADATA, load_backbone, read_backbone
from rdm_fast.run import checkpoint
from rdm_fast.run.checkpoint import Snapshot
from rdm_fast.run.folder import RunFolder
from rdm_fast.tools.export.targets import TARGETS, Target
from rdm_fast.tools.export.write import SUFFIXES, export_checkpoint

STEP = 7


def config(recipe: str, **model: Any) -> Config:
    """A recipe with narrow heads, for weights that are quickly written."""
    made = RECIPES[recipe]()
    small = {"projector_hidden": 8, "projector_dim": 8, "predictor_hidden": 8}
    return replace(made, model=replace(made.model, **(small | model)))


def save_run(path: Path, config: Config) -> tuple[Path, Method]:
    """A run folder with one checkpoint of random weights and statistics; its step folder."""
    torch.manual_seed(1)
    method = build_method(config)
    for module in method.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    with RunFolder.open(str(path), config, overwrite=False, rank=0) as folder:
        snapshot = Snapshot(STEP, dict(method.state_dict()), {}, {}, {})
        return checkpoint.save(folder.checkpoints, snapshot, 2), method.eval()


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], tuple[Path, Method]]:
    """`save_run`, once for each configuration: writing a ResNet takes a second."""

    @functools.cache
    def made(config: Config) -> tuple[Path, Method]:
        return save_run(tmp_path_factory.mktemp("run") / "run", config)

    return made


RunOf = Callable[[Config], tuple[Path, Method]]


def images(config: Config) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, config.augment.channels, 40, 40, generator=generator)


def run_instructions(file: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """What the text beside a file says: its one block of Python, run in the file's folder."""
    text = file.read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(file.parent)
    names: dict[str, Any] = {}
    exec(code, names)
    model: nn.Module = names["model"]
    return model.eval()


RESNET18 = {
    "cifar": ("cifar10_simsiam", {"stem": "cifar"}),
    "cifar_pad2": ("cifar10_simsiam", {}),
    "imagenet": ("imagenet100_simsiam", {}),
    "grey": ("digits_byol", {"backbone": "resnet18", "stem": "imagenet"}),
}


@pytest.mark.parametrize("kind", RESNET18)
def test_every_target_loads_what_was_written_and_embeds_the_same(
    kind: str, run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, model = RESNET18[kind]
    made = config(recipe, **model)
    step, method = run_of(made)
    with torch.no_grad():
        expected = method.backbone(images(made))
        assert expected.abs().mean() > 0.1  # 1e-6 says something
        for target in TARGETS:
            if target == "hf" and made.model.stem != "imagenet":
                continue
            said = export_checkpoint(step, target, out=tmp_path / f"{target}{SUFFIXES[target][0]}")
            file = Path(said.splitlines()[-1].removeprefix("how to load it: "))
            found = run_instructions(file, monkeypatch)(images(made))
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, msg=target)


def test_a_resnet50_loads_strictly_into_torchvision_and_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config("imagenet_rdm_simsiam")
    step, method = save_run(tmp_path / "run", made)
    with torch.no_grad():
        expected = method.backbone(images(made))
        for target in ("torchvision", "timm"):
            export_checkpoint(step, target)
            file = tmp_path / f"run/export/step-0000000{STEP}-{target}.safetensors.md"
            found = run_instructions(file, monkeypatch)(images(made))
            assert found.shape == (3, 2048)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, msg=target)


def test_a_small_stem_is_told_in_the_line_that_is_printed(run_of: RunOf, tmp_path: Path) -> None:
    def told(target: Target, **model: Any) -> str:
        recipe = "imagenet100_simsiam" if model.get("stem") == "imagenet" else "cifar10_simsiam"
        out = tmp_path / f"{target}{SUFFIXES[target][0]}"
        return export_checkpoint(
            run_of(config(recipe, **model))[0], target, out=out, overwrite=True
        )

    said = told("torchvision")
    assert "a plain resnet18 needs first" in said
    assert "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=2, bias=False)" in said
    assert "model.maxpool = torch.nn.Identity()" in said
    assert "main_lincls.py builds the 7x7 stem" in told("simsiam")
    assert "note" not in told("solo")  # whose stem this is
    assert "pads the first convolution by 2 and this run by 1" in told("solo", stem="cifar")
    assert "needs first" not in told("torchvision", stem="imagenet")


def test_a_resnet8_is_exported_for_this_package_alone(tmp_path: Path) -> None:
    made = config("digits_byol", width=6)
    step, method = save_run(tmp_path / "run", made)
    export_checkpoint(step, "safetensors", out=tmp_path / "here.safetensors")
    with torch.no_grad():
        found = load_backbone(tmp_path / "here.safetensors")(images(made))
        torch.testing.assert_close(found, method.backbone(images(made)), atol=1e-6, rtol=0)
    with safe_open(tmp_path / "here.safetensors", framework="pt") as file:
        assert {name.partition(".")[0] for name in file.keys()} == {"backbone", "projector"}  # noqa: SIM118
    for target in set(TARGETS) - {"safetensors"}:
        with pytest.raises(UsageError, match=f"--to {target} has no resnet8.*--to safetensors"):
            export_checkpoint(step, target)


@pytest.mark.parametrize("stem", ["cifar", "cifar_pad2"])
def test_the_padding_that_weights_cannot_tell_travels_with_them(
    stem: str, run_of: RunOf, tmp_path: Path
) -> None:
    step, _ = run_of(config("cifar10_simsiam", stem=stem))
    for target in ("torchvision", "timm", "safetensors"):
        out = tmp_path / f"{target}.safetensors"
        export_checkpoint(step, target, out=out)
        assert read_backbone(out).stem == stem
        with safe_open(out, framework="pt") as file:
            notes = json.loads(file.metadata()[METADATA])
        assert (notes["step"], notes["size"], len(notes["mean"])) == (STEP, 32, 3)


def test_files_that_must_be_pickles_hold_tensors_alone(run_of: RunOf, tmp_path: Path) -> None:
    step, _ = run_of(config("imagenet100_simsiam"))
    for target, prefix in (("simsiam", "module.encoder."), ("solo", "backbone.")):
        out = tmp_path / f"x{SUFFIXES[target][0]}"  # type: ignore[index]
        export_checkpoint(step, target, out=out)  # type: ignore[arg-type]
        content = torch.load(out, weights_only=True)
        assert set(content) == {"state_dict"}
        assert all(name.startswith(prefix) for name in content["state_dict"])
        # main_lincls.py and main_linear.py: what is left has to be the classifier alone
        assert f"{prefix}fc.weight" not in content["state_dict"]
        assert len(content["state_dict"]) == 120
        assert all(type(value) is Tensor for value in content["state_dict"].values())


def test_an_existing_export_is_replaced_only_on_request(tmp_path: Path) -> None:
    step, _ = save_run(tmp_path / "run", config("digits_byol", width=4))
    out = tmp_path / "x.safetensors"
    export_checkpoint(step, "safetensors", out=out)
    out.write_bytes(b"mine")
    with pytest.raises(CannotCreate, match=r"x\.safetensors exists: add --overwrite"):
        export_checkpoint(step, "safetensors", out=out)
    assert out.read_bytes() == b"mine"
    export_checkpoint(step, "safetensors", out=out, overwrite=True)
    assert read_backbone(out).width == 4


def fails(target: Target, **arguments: Any) -> Callable[[Path], object]:
    return lambda step: export_checkpoint(step, target, **arguments)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (fails("torchvision", out=Path("x.pth")), UsageError, r"writes a file \*\.safetensors"),
        (fails("solo", out=Path("x")), UsageError, r"writes a file \*\.ckpt"),
        (fails("hf"), UsageError, "timm builds no resnet18 with stem cifar_pad2: use --to timm"),
        (fails("timm", out=Path("/proc/x.safetensors")), CannotCreate, "cannot be written"),
    ],
    ids=["suffix", "none", "hub", "place"],
)
def test_what_cannot_be_exported_is_told(
    call: Callable[[Path], object], kind: type[Exception], message: str, run_of: RunOf
) -> None:
    step, _ = run_of(config("cifar10_simsiam"))
    with pytest.raises(kind, match=message):
        call(step)
    assert not (step.parents[1] / "export").exists()


def test_the_command_exports_the_newest_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "run", config("digits_byol", width=4))
    words = ["export", str(tmp_path / "run"), "--to", "safetensors"]
    for code in (0, 73):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == code
    out, err = capsys.readouterr()
    assert f"export/step-0000000{STEP}-safetensors.safetensors" in out
    assert err.startswith("error: ") and "--overwrite" in err
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(tmp_path / "run"), "--to", "onnx"])
    assert ended.value.code == 2
