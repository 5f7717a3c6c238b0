"""Every tool takes a run whose backbone is a model of timm."""

import json
import sys
from pathlib import Path

import pytest
import torch

from rdm_fast.config import ModelConfig
from rdm_fast.models.backbone import build_backbone
from rdm_fast.spectrum.watching import watch
from tests.forks import call
from tests.runs import rdm
from tests.tiny import command

VIT = "--model.backbone timm/test_vit --model.patch-size 4 --optim.epochs 1"


def test_a_vit_trains_and_every_tool_takes_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With BYOL's target, small views, accumulation, an online probe and kNN."""
    run, found = tmp_path / "run", tmp_path / "doctor.json"
    extra = f"{VIT} --augment.size 16 --augment.small-views 1 --augment.small-size 8"
    once = f"{extra} --optim.global-batch 700 --log.knn-every 1 --log.probe --optim.accumulate 2"
    recipe, *words = command(once, "digits_byol")
    assert rdm("train", recipe, *words, "--out", run) == 0
    assert rdm("doctor", recipe, *words, "--batches", "1", "--json", found) == 0
    assert json.loads(found.read_text())
    assert rdm("eval", run, "--protocol", "closed-form") == 0
    for target, code in (("timm", 0), ("hf", 0), ("torchvision", 2)):
        assert rdm("export", run, "--to", target) == code
    pytest.importorskip("matplotlib")
    assert rdm("report", run, "--map", "none", "--out", tmp_path / "page.html") == 0
    assert "timm/test_vit" in (tmp_path / "page.html").read_text()
    out, err = capsys.readouterr()
    assert "kNN" in out and err.count("error: ") == 1


def test_a_vits_embeddings_can_be_watched() -> None:
    vit, d_emb = build_backbone(ModelConfig(backbone="timm/test_vit"), 3, (32,))
    with watch(vit, every=1) as spectra:
        vit.train()(torch.randn(8, 3, 32, 32))
    assert spectra.records[0].eigenvalues.shape == (min(8, d_emb),)


@pytest.mark.slow  # whole processes, a second each to import timm
@pytest.mark.skipif(sys.platform != "linux", reason="the fork server")
def test_a_sweep_of_vits(tmp_path: Path) -> None:
    recipe, *words = command(VIT)
    filters = ["--filter", "control", "online_s1", "--jobs", "1"]
    done = call(
        "rdm", "sweep", recipe, *words, *filters, "--out", "sweep", cwd=tmp_path, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sweep/control/status.json").exists()
