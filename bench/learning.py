"""Accuracy of the methods on CIFAR-10, within a time limit; the same command continues the runs.

    python -m bench.learning --data cifar10_jpeg.npz --out runs/learning --epochs 20 --minutes 8

Trains RDM-SimSiam with a target filter s^-1 and with an online filter s, SimSiam with its learned
predictor, and SimSiam without a filter, by the recipes of CIFAR-10 except for the number of epochs.
Then evaluates each (kNN and `reference-cifar` on cached features). After the given minutes the
current run saves and stops; the same command continues it. --json gets all results so far, however
the command ends.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.machine import ROOT, describe

RUNS = {
    "RDM-SimSiam, target s^-1": ["cifar10_rdm_simsiam"],
    "RDM-SimSiam, online s": ["cifar10_rdm_simsiam", "--pred-location", "online", "--sigma", "1"],
    "SimSiam": ["cifar10_simsiam"],
    "nothing filtered": ["cifar10_rdm_simsiam", "--sigma", "0"],
}
SMALLEST = [
    *("--model.backbone", "resnet8", "--model.width", "4", "--model.projector-hidden", "16"),
    *("--model.projector-dim", "24", "--model.predictor-hidden", "8", "--precision", "fp32"),
]
DIGITS = {
    name: ["digits" + recipe.removeprefix("cifar10"), *rest]
    for name, (recipe, *rest) in RUNS.items()
}
INTERRUPTED = 75  # saved; the same command continues


def train(args: list[str], folder: Path, deadline: float) -> int:
    """Train until the deadline, then save and stop; the exit status."""
    process = subprocess.Popen([sys.executable, "train.py", *args, "--out", str(folder)], cwd=ROOT)
    try:
        return process.wait(timeout=max(deadline - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        return process.wait()


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
    parser.add_argument("--data", type=Path, help="CIFAR-10 as one packed .npz; left out: digits")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data of each run")
    parser.add_argument("--minutes", type=float, default=8.0, help="until the current run stops")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--smoke", action="store_true", help="the smallest model")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    shared = ["--optim.epochs", str(args.epochs), "--optim.warmup-epochs", str(args.epochs / 10)]
    shared += SMALLEST if args.smoke else []
    if args.data:
        shared += ["--data.name", "arrays", "--data.root", str(args.data.resolve())]
    measured, status = {}, 0
    for number, (name, flags) in enumerate((RUNS if args.data else DIGITS).items()):
        folder = args.out / f"{number}"
        status = train([*flags, *shared], folder, deadline)
        if status == 0 and not list((folder / "evaluation").glob("*.json")):
            evaluate = [sys.executable, "eval_linear.py", str(folder)]
            evaluate += ["--protocol", "reference-cifar"] if args.data else []
            status = subprocess.run(evaluate, cwd=ROOT).returncode
        measured[name] = results(folder)
        if status:
            break
    result = {"machine": describe(), "epochs": args.epochs, "runs": measured, "status": status}
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0 if status in (0, INTERRUPTED) else status


if __name__ == "__main__":
    sys.exit(main())
