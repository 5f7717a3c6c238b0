"""Accuracy of the methods on CIFAR-10, within a time limit; the same command continues the runs.

    RDM_CIFAR10_NPZ=cifar10_jpeg.npz python -m bench.learning --out runs/learning --minutes 8

Trains RDM-SimSiam with a target filter s^-1, the same without a filter, with an online filter s,
and SimSiam with its learned predictor, by the recipes of CIFAR-10 except for the number of epochs;
on scikit-learn's digits where RDM_CIFAR10_NPZ names no packed images. Then evaluates each (kNN and
a linear probe on cached features). After the given minutes the current run saves and stops. Every
epoch and every evaluation is a row of --rows.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.rows import SMALL, append
from rdm_fast.config import Config, ModelConfig
from rdm_fast.config.recipes import recipe
from rdm_fast.errors import Interrupted
from rdm_fast.evaluation.loaded_backbone import load_for_evaluation
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.evaluation.run import evaluate
from rdm_fast.run.folder import RunFolder
from rdm_fast.runtime.distributed import choose_device
from rdm_fast.training.trainer import Trainer

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "RDM-SimSiam, target s^-1": ("rdm_simsiam", {}),
    "nothing filtered": ("rdm_simsiam", {"sigma": 0.0}),
    "RDM-SimSiam, online s": ("rdm_simsiam", {"location": "online", "sigma": 1.0}),
    "SimSiam": ("simsiam", {}),
}


def configure(method: str, filtered: dict[str, Any], epochs: int, data: str) -> Config:
    """The recipe of this method for the images in a .npz file, or for digits."""
    config = recipe(f"{'cifar10' if data else 'digits'}_{method}")
    config = replace(config, filter=replace(config.filter, **filtered))
    if data:
        config = replace(config, data=replace(config.data, name="arrays", root=data))
    if SMALL:
        model = ModelConfig(backbone="resnet8", width=4, projector_hidden=16, projector_dim=24,
                            predictor_hidden=8)  # fmt: skip
        config = replace(config, model=replace(model, projector_bn=config.model.projector_bn),
                         augment=replace(config.augment, size=8))  # fmt: skip
        epochs = 1
    optim = replace(config.optim, epochs=epochs, warmup_epochs=epochs / 10)
    return replace(config, optim=optim)


def train(config: Config, path: Path, deadline: float, report: Callable[[], None]) -> bool:
    """Train until the deadline, then save and stop; whether the run is complete."""
    with RunFolder.open(str(path), config, overwrite=False, rank=0) as folder:
        if not folder.is_new:
            folder.accept(config)
        trainer = Trainer(config, folder, choose_device(config.device))

        def watch(_: object) -> None:
            if time.monotonic() > deadline:
                trainer.ask_to_stop()
            if (trainer.step + 1) % trainer.loader.steps_per_epoch == 0:
                report()

        trainer.after_step.append(watch)
        try:
            trainer.fit()
        except Interrupted as error:
            folder.write_end(error)
            return False
        folder.write_status("finished", step=trainer.step, checkpoint=f"step-{trainer.step:08d}")
    return True


def results(folder: Path) -> dict[str, Any]:
    """The results of a run so far: last metrics, speed, and evaluation if there is one."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [line for line in lines if "loss" in line]
    knn = [(line["step"], line["knn_top1"]) for line in lines if "knn_top1" in line]
    found: dict[str, Any] = {"knn_top1_by_step": knn}
    if steps:
        speeds = [line["images_per_s"] for line in steps[1:]] or [steps[0]["images_per_s"]]
        found |= {"last": steps[-1], "images_per_s": statistics.median(speeds), "n": len(speeds)}
    if files := sorted((folder / "evaluation").glob("*.json")):
        found["evaluation"] = json.loads(files[-1].read_text())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.learning", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data of each run")
    parser.add_argument("--minutes", type=float, default=8.0, help="until the current run stops")
    parser.add_argument("--rows", type=Path, help="file to append results to, as JSON")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    data = "" if SMALL else os.environ.get("RDM_CIFAR10_NPZ", "")
    for number, (name, (method, filtered)) in enumerate([*RUNS.items()][: 1 if SMALL else None]):
        folder = args.out / str(number)
        config = configure(method, filtered, args.epochs, data)

        def report(name: str = name, folder: Path = folder, config: Config = config) -> None:
            row = {"run": name, "epochs": config.optim.epochs, "data": data or "digits"}
            append(args.rows, row | results(folder))

        if not list((folder / "evaluation").glob("*.json")):
            complete = train(config, folder, deadline, report)
            if complete and time.monotonic() < deadline:
                command = EvaluateCommand(checkpoint=str(folder), protocol="reference-cifar")
                evaluate(load_for_evaluation(command), command, choose_device("auto"))
            report()
        if time.monotonic() > deadline:
            print(f"stopped after {args.minutes:g} minutes: the same command continues")
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
