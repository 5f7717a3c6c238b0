"""The paper's claim about SimSiam, measured: its learned predictor is a low-pass filter."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from rdm_fast.telemetry import SPECTRUM_KEYS, read_spectra
from tests.runs import run, with_log
from tests.tiny import tiny

SCRIPT = Path(__file__).parents[2] / "docs" / "predictor_response_figure.py"
STEPS, EVERY, LAST = 105, 7, 5  # of the run, between records, and records that are averaged


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SimSiam with its MLP on digits for 15 epochs, D = 24."""
    config = tiny("digits_simsiam", epochs=15, global_batch=200, base_lr=0.5)
    model = replace(config.model, projector_hidden=48, predictor_hidden=12)
    path = tmp_path_factory.mktemp("simsiam") / "run"
    run(path, with_log(replace(config, model=model), spectrum_every=EVERY, save_every=STEPS))
    return path


def test_spectra_are_recorded_at_their_steps_and_complete(trained: Path) -> None:
    records = read_spectra(trained / "spectrum.jsonl")
    assert [record["step"] for record in records] == list(range(EVERY, STEPS + 1, EVERY))
    for record in records:
        assert record.keys() == SPECTRUM_KEYS.keys()
        assert all(record[key].shape == (24,) for key in ("online", "projection", "response"))
        np.testing.assert_allclose(record["target"], record["projection"])  # the other view's
        np.testing.assert_allclose(record["s"] ** 2 / 200, record["projection"], rtol=0.1)
        assert 0 <= record["alignment"] <= 1


def test_simsiams_learned_predictor_is_a_low_pass_filter(trained: Path) -> None:
    """The stronger a direction of the projections, the more of it passes.

    Over seeds 0 to 5 the rank correlation of g(s) with s was 0.53, 0.61, 0.50, 0.58, 0.72 and 0.31
    (n = 24), and the strongest third of the directions passed with 0.24 to 0.72 on average, the
    weakest with -0.06 to 0.05. This is seed 0.
    """
    records = read_spectra(trained / "spectrum.jsonl")[-LAST:]
    s, g = (np.mean([record[key] for record in records], axis=0) for key in ("s", "response"))
    assert np.isfinite(g).all()
    assert spearmanr(s, g).statistic > 0.3
    assert g[:8].mean() > 0.2 > 0.1 > abs(g[-8:].mean())


def test_the_figure_is_drawn_from_a_run(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    spec = importlib.util.spec_from_file_location("predictor_response_figure", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.draw([trained, trained], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="has no spectra: train it"):
        script.measured(tmp_path / "empty")
