"""Run folders as training leaves them, without training."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rdm_fast.config import Config
from rdm_fast.config.saved import config_to_dict
from rdm_fast.run.folder import RunFolder, State
from tests.tiny import tiny

STEPS_PER_EPOCH = 4


def line(step: int, **values: Any) -> dict[str, Any]:
    """Metrics of a step, all different."""
    plain = {
        "step": step,
        "epoch": step / STEPS_PER_EPOCH,
        "loss": -0.1 * step,
        "images_per_s": 168.0,
        "data_wait_s": 0.25,
        "effective_rank/online": 2.0 + step,
        "effective_rank/target": 5.0 + 2 * step,
        "effective_rank/projection": 5.0 + 2 * step,
        "rank_difference": 3.0 + step,
    }
    return plain | values


def make_run(
    path: Path,
    config: Config | None = None,
    lines: Sequence[dict[str, Any]] | None = None,
    state: State = "finished",
    **status: Any,
) -> Path:
    """A run folder with metrics of eight steps, every second one logged, and no checkpoint."""
    config = replace(config or tiny(), out=str(path))
    with RunFolder.open(str(path), config, overwrite=False, rank=0) as folder:
        folder.write_status(state, step=8, **status)
    logged = [line(step) for step in (2, 4, 6, 8)] if lines is None else lines
    environment = {"device": "an abacus", "torch": "2.99", "config": config_to_dict(config)}
    records = [{"environment": environment}, {"step": 0, "knn_top1": 50.0}, *logged]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(text)
    return path


def evaluate(path: Path, step: int = 8, protocol: str = "logistic", **values: Any) -> None:
    """A result as rdm eval leaves it."""
    result = {"protocol": protocol, "top1": 90.0, "knn_top1": 88.0, **values}
    file = path / "evaluation" / f"step-{step:08d}-{protocol}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result))


def spectrum_line(step: int, **values: Any) -> str:
    """A line of spectrum.jsonl; the third direction is cut off."""
    plain = {
        "step": step,
        "online": [4.0, 1.0, 0.1],
        "target": [3.0, 2.0, 1.0],
        "projection": [3.0, 2.0, 1.0],
        "s": [2.0, 1.0, 0.5],
        "response": [1.0, 0.5, None],
        "alignment": 0.9,
    }
    return json.dumps(plain | values) + "\n"
