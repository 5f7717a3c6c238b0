"""The Python blocks of the README and docs/integrations.md run; lightly's SimSiam trains."""

import re
from pathlib import Path

import pytest
import torch

from rdm_fast import FilterConfig, SpectralPredictor
from rdm_fast.spectrum import measured_response, watch
from tests.tiny import batch

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"(<!-- not run: needs ([\w-]+) -->\n)?^```python\n(.*?)^```", re.M | re.S)
BLOCKS = [
    (match[2], match[3])
    for page in ("README.md", "docs/integrations.md")
    for match in FENCE.finditer((ROOT / page).read_text("utf-8"))
]


def test_the_blocks_are_found() -> None:
    assert [needs for needs, _ in BLOCKS] == [*[None] * 5, "solo-learn", None]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_as_it_stands(number: int) -> None:
    needs, code = BLOCKS[number]
    compiled = compile(code, f"block {number + 1}", "exec")
    if needs:
        pytest.skip(f"block {number + 1} is only compiled: {needs} is not installed")
    if "lightly" in code:
        pytest.importorskip("lightly", reason="lightly is not installed")
    names: dict[str, object] = {"__name__": "block"}
    exec(compiled, names)
    if "loss" in names:
        assert torch.isfinite(names["loss"])  # type: ignore[arg-type]


def test_lightlys_simsiam_trains_with_a_spectral_predictor_and_keeps_its_rank() -> None:
    """In thirty steps on noise that two views share, the loss falls and no direction is lost."""
    heads = pytest.importorskip("lightly.models.modules", reason="lightly is not installed")
    loss_module = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    model = torch.nn.Module()
    model.backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32))
    model.projection_head = heads.SimSiamProjectionHead(32, 64, 16)
    model.prediction_head = SpectralPredictor(FilterConfig(sigma=1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    with watch(model, every=1) as spectra:
        for step in range(30):
            views = batch(64, seed=step)
            z0, z1 = (
                model.projection_head(model.backbone(view)) for view in (views.view1, views.view2)
            )
            p0, p1 = model.prediction_head(z0), model.prediction_head(z1)
            loss = 0.5 * (loss_module(z0.detach(), p1) + loss_module(z1.detach(), p0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < losses[0]
    ranks = [seen.effective_rank for seen in spectra.records if seen.name == "projection_head"]
    assert len(ranks) == 60 and ranks[-1] > 3
    response = measured_response(z0.detach(), p0.detach())
    response = response[~response.isnan()]
    assert len(response) > 3 and (response.diff() < 1e-4).all()  # low-pass
