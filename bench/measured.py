"""What `bench.numbers` measures on a CPU: runs on digits, learned predictors, probes, memory.

Each `measure_...` returns values by row and column of a table, and has its columns beside it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor

from bench.machine import ROOT
from rdm_fast.config.recipes import RECIPES
from rdm_fast.data import load
from rdm_fast.evaluation.accuracy import rank_classes, topk_accuracy
from rdm_fast.evaluation.probe import choose_ridge, fit_closed_form, fit_iterated
from rdm_fast.evaluation.protocols import PROTOCOLS, Protocol
from rdm_fast.evaluation.score import score
from rdm_fast.telemetry import read_spectra
from rdm_fast.tools.report.read import read_run

Values = dict[str, dict[str, list[float]]]
"""By row and column of a table; one value per seed."""

SEEDS = range(5)


class Column(NamedTuple):
    """How a column is shown and what agrees with it (see `bench.numbers.tolerance`)."""

    decimals: int
    absolute: float
    relative: float = 0.0


class Runs:
    """Runs in a folder, some at a time with one thread each; complete ones are kept."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder, self.jobs = folder.resolve(), jobs

    def path(self, arguments: Sequence[str]) -> Path:
        """The folder of the run with these arguments of `rdm train`."""
        return self.folder / re.sub(r"[^\w.]+", "-", "-".join(arguments))

    def evaluated(self, runs: Iterable[Sequence[str]]) -> None:
        """Train and evaluate runs with these arguments of `rdm train`."""

        def complete(arguments: Sequence[str]) -> None:
            folder = self.path(arguments)
            self.call("train.py", *arguments, "--out", str(folder))
            if not list((folder / "evaluation").glob("*.json")):
                self.call("eval_linear.py", str(folder))

        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(complete, runs))

    def call(self, *arguments: str) -> str:
        """The output of a Python program of this project.

        Raises:
            RuntimeError: it failed.
        """
        print(f"  {' '.join(arguments)}", flush=True)
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            ended = f"{' '.join(arguments)} ended with {done.returncode}"
            raise RuntimeError(f"{ended}:\n{done.stderr}")
        return done.stdout


def with_seeds(arguments: Sequence[str], seeds: Sequence[int] = SEEDS) -> list[list[str]]:
    return [[*arguments, "--seed", str(seed)] for seed in seeds]


# ---- digits ------------------------------------------------------------------------------------

IMAGE = 100 / 397 + 1e-6
"""One of the digits' test images, in percent."""
LINEAR, KNN, RANK = "linear top-1 (%)", "kNN top-1 (%)", "effective rank"
DIGITS = {LINEAR: Column(1, IMAGE), KNN: Column(1, IMAGE), RANK: Column(1, 0.1)}
DEFAULT = "RDM-SimSiam, target filter s⁻¹ (the default)"
VARIANTS = {
    DEFAULT: ["digits_rdm_simsiam"],
    "the same without a filter": ["digits_rdm_simsiam", "--sigma", "0"],
}


def measure_digits(runs: Runs, quick: bool) -> Values:
    """Accuracies and last effective rank; quick: of one default run and of raw pixels."""
    variants = {DEFAULT: VARIANTS[DEFAULT]} if quick else VARIANTS
    result = score(*pixels(), PROTOCOLS["logistic"], classes=10, seed=0)
    raw = {LINEAR: [result.top1], KNN: [result.knn_top1]}
    seeds = SEEDS[:1] if quick else SEEDS
    return measure_runs(runs, variants, seeds) | {"raw pixels, same probe": raw}


def measure_runs(
    runs: Runs, variants: Mapping[str, Sequence[str]], seeds: Sequence[int] = SEEDS
) -> Values:
    """Accuracies and last effective rank of runs with these arguments of `rdm train`."""
    rows = {title: with_seeds(arguments, seeds) for title, arguments in variants.items()}
    runs.evaluated(arguments for row in rows.values() for arguments in row)
    values: Values = {}
    for title, row in rows.items():
        found = [read_run(runs.path(arguments), title) for arguments in row]
        values[title] = {
            LINEAR: [run.evaluation["top1"] for run in found],
            KNN: [run.evaluation["knn_top1"] for run in found],
            RANK: [run.series("effective_rank/projection").values[-1] for run in found],
        }
    return values


def pixels() -> list[tuple[Tensor, Tensor]]:
    """Pixels in [0, 1] and labels of the digits' training and of their test images."""
    data = RECIPES["digits_rdm_simsiam"]().data
    return [
        (torch.from_numpy(images.pixels).flatten(1) / 255, torch.from_numpy(images.labels))
        for images in (load(data, "train"), load(data, "test"))
    ]


def draw_digits(runs: Runs) -> None:
    folders = [str(runs.path(with_seeds(row)[0])) for row in VARIANTS.values()]
    runs.call("docs/digits_figure.py", *folders, "docs/digits.png")


# ---- branches ----------------------------------------------------------------------------------

FEW = range(3)
NETWORKS: dict[str, list[str]] = {
    "online (the default)": ["--branch", "online"],
    "online, `--bn recompute`": ["--branch", "online", "--bn", "recompute"],
    "target (`--bn own`)": ["--branch", "target"],
    "target, `--bn online`": ["--branch", "target", "--bn", "online"],
    "target, `--bn recompute`": ["--branch", "target", "--bn", "recompute"],
}


def measure_branches(runs: Runs, quick: bool) -> Values:
    """Accuracies of each branch of BYOL runs, by the statistics of its batch norms."""
    trained = with_seeds(["digits_byol"], FEW)
    runs.evaluated(trained)

    def result(row: Sequence[str], flags: Sequence[str]) -> dict[str, float]:
        out = runs.path([*row, *flags])
        if not list(out.glob("*.json")):
            runs.call("eval_linear.py", str(runs.path(row)), *flags, "--out", str(out))
        (file,) = out.glob("*.json")
        found: dict[str, float] = json.loads(file.read_text("utf-8"))
        return found

    keys = {LINEAR: "top1", KNN: "knn_top1", RANK: "effective_rank"}
    values: Values = {}
    for title, flags in NETWORKS.items():
        found = [result(row, flags) for row in trained]
        values[title] = {column: [each[key] for each in found] for column, key in keys.items()}
    return values


# ---- the sweep ---------------------------------------------------------------------------------

CONTROL = "no filter"
_RANK = Column(1, 1.0, 0.2)
SWEEP = {
    KNN: Column(1, 2.0),
    LINEAR: Column(1, 2.0),
    "effective rank, online": _RANK,
    "target": _RANK,
    "projections": _RANK,
    "rank difference, last": Column(2, 0.5, 0.5),
    "lowest": Column(2, 0.5, 0.5),  # the smallest is 0.6: its sign holds
}


def measure_sweep(runs: Runs, quick: bool) -> Values:
    """The results of `rdm sweep`."""
    return sweep_values(swept(runs, "digits_rdm_simsiam", 0))


def swept(runs: Runs, name: str, seed: int) -> list[dict[str, Any]]:
    """The rows of a sweep."""
    folder = runs.folder / f"sweep_{name}-{seed}"
    options = ["--seed", str(seed), "--jobs", str(runs.jobs), "--out", str(folder)]
    runs.call("-m", "rdm_fast", "sweep", name, *options)
    rows: list[dict[str, Any]] = json.loads((folder / "sweep.json").read_text("utf-8"))["rows"]
    return rows


def sweep_values(rows: Iterable[dict[str, Any]]) -> Values:
    values: Values = {}
    for row in rows:
        ranks = [row["effective_rank"][key] for key in ("online", "target", "projection")]
        differences = [row["rank_difference"], row["rank_difference_lowest"]]
        found = [row["knn_top1"], row["probe_top1"], *ranks, *differences]
        columns = values.setdefault(row["filter"], {key: [] for key in SWEEP})
        for key, value in zip(SWEEP, found, strict=True):
            columns[key].append(value)
    return values


def draw_sweep(runs: Runs) -> None:
    shutil.copy(
        runs.folder / "sweep_digits_rdm_simsiam-0" / "sweep.png", ROOT / "docs" / "sweep.png"
    )


# ---- learned predictors and the collapse guard -------------------------------------------------

PREDICTORS = ("digits_simsiam", "digits_byol")
RECORDS = 3
"""Records at a run's end that are averaged."""
RESPONSE = {
    "all directions": Column(2, 0.01),
    "those with s > 0.05 s₁": Column(2, 0.01),
    "g of the three strongest": Column(2, 0.01),
    "mean \\|g\\| of the weaker half": Column(3, 0.005),
}


def measure_response(runs: Runs, quick: bool) -> Values:
    """Measured response of learned predictors at the end of training."""
    rows = {recipe: with_seeds([recipe]) for recipe in PREDICTORS}
    runs.evaluated(arguments for row in rows.values() for arguments in row)
    values: Values = {}
    for recipe, row in rows.items():
        found = [response(read_spectra(runs.path(each) / "spectrum.jsonl")) for each in row]
        columns = zip(*found, strict=True)
        values[f"`{recipe}`"] = dict(zip(RESPONSE, map(list, columns), strict=True))
    return values


def response(records: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """The columns of RESPONSE, of the directions that have a response in all last records."""
    last = records[-RECORDS:]
    s, g = (np.mean([record[key] for record in last], axis=0) for key in ("s", "response"))
    s, g = s[np.isfinite(g)], g[np.isfinite(g)]
    strong = s > 0.05 * s[0]
    correlations = [spearmanr(s, g).statistic, spearmanr(s[strong], g[strong]).statistic]
    return (*map(float, correlations), float(g[:3].mean()), float(abs(g[len(g) // 2 :]).mean()))


def draw_response(runs: Runs) -> None:
    folders = [str(runs.path(with_seeds([recipe])[0])) for recipe in PREDICTORS]
    runs.call("docs/predictor_response_figure.py", *folders, "docs/predictor_response.png")


GUARDED = {
    "RDM-SimSiam, target filter": ["digits_rdm_simsiam"],
    "SimSiam, learned predictor": ["digits_simsiam"],
    "RDM-BYOL": ["digits_rdm_byol"],
    "BYOL, learned predictor": ["digits_byol"],
    "no filter": ["digits_rdm_simsiam", "--sigma", "0"],
    "SymSimSiam, the control": ["digits_symsimsiam"],
}
LOWEST = "lowest effective rank of the projections"
GUARD = {LOWEST: Column(1, 0.5, 0.25)}


def measure_guard(runs: Runs, quick: bool) -> Values:
    """Lowest effective rank once the guard has started, in 30 epochs."""
    rows = {title: [*arguments, "--epochs", "30"] for title, arguments in GUARDED.items()}
    runs.evaluated(rows.values())
    return {title: {LOWEST: [lowest_rank(runs.path(row))]} for title, row in rows.items()}


def lowest_rank(folder: Path) -> float:
    run = read_run(folder, folder.name)
    assert run.config is not None
    series = run.series("effective_rank/projection")
    start = run.config.guard.warmup * run.config.optim.epochs
    return min(v for epoch, v in zip(series.epochs, series.values, strict=True) if epoch > start)


# ---- probes ------------------------------------------------------------------------------------

TOP1 = {"top-1 (%)": Column(1, 0.2)}
SGD, LARS = PROTOCOLS["reference-cifar"], PROTOCOLS["reference-imagenet"]
SOLVERS: dict[str, Protocol | None] = {
    "SGD, lr 1, weight decay 10⁻³": replace(SGD, lr=1.0, weight_decay=1e-3),
    "LARS, batch 64": replace(LARS, batch=64),  # its 4096 is for a million images
    "closed form": None,
    "SGD without weight decay (`reference-cifar`)": SGD,
}


def measure_solvers(runs: Runs | None, quick: bool) -> Values:
    """Accuracy of linear probes by four folds over all digits.

    The features are a fixed random hidden layer over the pixels: almost linearly separable.
    """
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    X, Y = images[order].float() / 16, labels[order]
    weight = torch.randn(X.shape[1], 512, generator=torch.Generator().manual_seed(0))
    X = ((X - X.mean(dim=0)) @ weight / 8**0.5).relu()

    def correct(protocol: Protocol | None, test: Tensor) -> float:
        train = X[~test], Y[~test]
        if protocol is None:
            ridge = choose_ridge(*train, classes=10, seed=0)
            classifier = fit_closed_form(*train, classes=10, ridge=ridge)
        else:
            classifier = fit_iterated(*train, classes=10, protocol=protocol, seed=0)
        return topk_accuracy(rank_classes(classifier.logits(X[test])), Y[test], 1) * int(test.sum())

    folds = [torch.arange(len(Y)) % 4 == k for k in range(4)]
    (column,) = TOP1
    return {
        title: {column: [sum(correct(protocol, test) for test in folds) / len(Y)]}
        for title, protocol in SOLVERS.items()
    }


MEMORY = {f"{name} (MiB)": Column(0, 0, 0.15) for name in ("before", "embeddings", "peak")}


def measure_memory(runs: Runs, quick: bool) -> Values:
    """Resident memory of an evaluation of 50,000 training embeddings."""
    values: Values = {}
    for protocol in ("closed-form", "reference-imagenet"):
        output = runs.call("-m", "bench.evaluation_memory", "--protocol", protocol)
        found = json.loads(output.splitlines()[-1])
        keys = ("imports_mib", "embeddings_mib", "peak_mib")
        values[f"`{protocol}`"] = {c: [found[k]] for c, k in zip(MEMORY, keys, strict=True)}
    return values
