"""Reading a run folder, as far as possible. Missing or damaged parts become sentences.

People ask for a report when something went wrong as often as when all went well: a run may be
unfinished, killed in the middle of a line, or have lost a file. Nothing here imports torch.
"""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rdm_fast.config import Config, FilterConfig
from rdm_fast.config.saved import config_from_dict, config_to_dict, flat
from rdm_fast.errors import DataError, InputMissing, UserError, message_of
from rdm_fast.run import schema
from rdm_fast.run.folder import read_config, read_status
from rdm_fast.runtime.untrusted import read_table

LINE: schema.Schema = {"step": schema.whole()}
EVALUATION: schema.Schema = {
    "protocol": schema.ANY_TEXT,
    "top1": schema.PERCENT,
    "knn_top1": schema.PERCENT_OR_NONE,
}
METHODS = {
    "simsiam": "SimSiam", "byol": "BYOL", "dino": "DINO", "swav": "SwAV", "symsimsiam": "SymSimSiam"
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One metric over a run; values that were not finite are NaN."""

    epochs: list[float]
    values: list[float]

    @property
    def last(self) -> float | None:
        """The newest finite value."""
        return next((value for value in reversed(self.values) if math.isfinite(value)), None)


@dataclass
class Run:
    """The contents of a run folder; `notes` lists in whole sentences what could not be read."""

    path: Path
    label: str
    config: Config | None = None
    status: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    """The result of the newest evaluated step, as in its JSON file."""
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration with dotted names; empty if it cannot be read."""
        return flat(config_to_dict(self.config)) if self.config else {}

    @property
    def state(self) -> str:
        return str(self.status.get("state", "unknown"))

    @property
    def steps_per_epoch(self) -> float:
        """From the first line with both; 1 without any."""
        pairs = [(line["step"], line.get("epoch")) for line in self.lines]
        return next((step / e for step, e in pairs if isinstance(e, int | float) and e > 0), 1.0)

    @property
    def title(self) -> str:
        """Method and predictor, in short."""
        return describe(self.config) if self.config else "unknown configuration"

    def series(self, key: str) -> Series:
        """A metric over epochs. Lines without it are skipped."""
        rows = [line for line in self.lines if key in line]
        per_epoch = self.steps_per_epoch
        epochs = [row["step"] / per_epoch for row in rows]
        return Series(epochs, [_number(row[key]) for row in rows])

    def seconds(self) -> float | None:
        """Time in training steps, without evaluation and saving, over all starts of the run."""
        batch = self.config.optim.global_batch if self.config else None
        before, total = 0, 0.0
        for line in self.lines:
            speed = _number(line.get("images_per_s"))
            if batch and speed > 0:
                total += (line["step"] - before) * batch / speed
                before = line["step"]
        return total or None

    def median_speed(self) -> float | None:
        """Images per second, the median of all logged intervals."""
        values = [v for v in self.series("images_per_s").values if math.isfinite(v)]
        return median(values) if values else None


def _number(value: Any) -> float:
    return float(value) if schema.is_number(value) else math.nan


def describe(config: Config) -> str:
    """Method and predictor in short, as in "SimSiam, target s^-1"."""
    name = METHODS[config.method]
    if config.predictor == "none":
        return f"{name}, no predictor"
    if config.predictor == "mlp":
        return f"{name}, learned predictor"
    return f"{name}, {describe_filter(config.filter)}"


def describe_filter(config: FilterConfig) -> str:
    """Branch and g, as in "online log(1 + s)"."""
    if config.kind == "poly" and config.sigma == 0:
        return "no filter"
    g = {"log": "log s", "log_1": "log(1 + s)", "log_2": "log(1 + s^2)"}
    return f"{config.location} {g.get(config.kind, f's^{config.sigma:g}')}"


# ---- folders -----------------------------------------------------------------------------------


def find_runs(names: Sequence[str]) -> list[Path]:
    """Run folders, each once, in the order given; a folder of run folders stands for all of them.

    Raises:
        InputMissing: a name is neither.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, names):
        if not path.is_dir():
            raise InputMissing(f"{path} is not a folder: give run folders")
        inside = [path] if _is_run(path) else sorted(p for p in path.iterdir() if _is_run(p))
        if not inside:
            raise InputMissing(f"{path} has no run.json, nor a folder with one: give run folders")
        found |= {each.resolve(): each for each in inside}
    return list(found.values())


def _is_run(path: Path) -> bool:
    return path.is_dir() and (path / "run.json").exists()


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Every run, with the shortest labels that distinguish them."""
    return [read_run(*pair) for pair in zip(paths, labels(paths), strict=True)]


def labels(paths: Sequence[Path]) -> list[str]:
    """For each path, as few of its last parts as are unique."""
    parts = [path.resolve().parts for path in paths]

    def label(own: tuple[str, ...]) -> str:
        for count in range(1, len(own)):
            if sum(other[-count:] == own[-count:] for other in parts) == 1:
                return "/".join(own[-count:])
        return str(Path(*own))

    return [label(own) for own in parts]


# ---- one run -----------------------------------------------------------------------------------


def read_run(path: Path, label: str) -> Run:
    """Everything in a run folder that can be read."""
    run = Run(path, label)
    _read_metrics(run)
    try:
        run.config = read_config(path)
    except UserError as error:
        run.notes.append(sentence(error))
        with suppress(UserError, KeyError):
            run.config = config_from_dict(run.environment["config"])
            run.notes.append("Its configuration is taken from metrics.jsonl.")
    try:
        run.status = read_status(path)
    except UserError as error:
        run.notes.append(sentence(error))
    if run.state != "finished" and (message := run.status.get("message")):
        run.notes.append(sentence(f"{run.state}: {message}"))
    _read_evaluation(run)
    return run


def sentence(text: object) -> str:
    """A message on one line, with a full stop."""
    plain = " ".join(str(text).split())
    return plain if plain.endswith(".") else f"{plain}."


def _read_metrics(run: Run) -> None:
    file = run.path / "metrics.jsonl"
    try:
        raw = file.read_bytes()
    except OSError as error:
        run.notes.append(f"There are no metrics: {file} cannot be read ({error.strerror}).")
        return
    whole, _, _torn = raw.rpartition(b"\n")  # the last line may be incomplete
    damaged = 0
    for text in whole.split(b"\n") if whole else ():
        line = _json(text)
        if isinstance(line, dict) and "environment" in line:
            run.environment = line["environment"] if isinstance(line["environment"], dict) else {}
        elif isinstance(line, dict) and not schema.wrong(line, LINE):
            run.lines.append(line)
        else:
            damaged += 1
    if damaged:
        run.notes.append(f"{damaged} line(s) of {file} are damaged and skipped.")
    if not run.lines:
        run.notes.append(f"{file} has no metrics yet.")


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_evaluation(run: Run) -> None:
    """The newest step's result; of several protocols the one saved last.

    Results of another branch than the method's, or with other statistics than its own, are left
    out: they do not compare with those of other runs.
    """
    branch = run.config.branch() if run.config else None
    files = [*(run.path / "evaluation").glob("step-*.json")]
    newest = max((file.name.split("-")[1] for file in files), default="")
    same = [file for file in files if file.name.split("-")[1] == newest]
    for file in sorted(same, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            result = read_table(file)
            schema.require(result, EVALUATION, file)
        except (DataError, OSError) as error:
            run.notes.append(sentence(f"{message_of(error)}; skipped"))
        else:
            of_branch = branch in (None, result.get("branch", branch))
            if of_branch and result.get("bn", "own") == "own":
                run.evaluation = result
                return


# ---- several runs ------------------------------------------------------------------------------


def differences(runs: Iterable[Run]) -> dict[str, list[Any]]:
    """Settings that differ between the runs with a known configuration, except `out`.

    Returns:
        From dotted name to the value of each run; None if its configuration is unknown.
    """
    settings = [run.settings for run in runs]
    known = [each for each in settings if each]
    names = dict.fromkeys(name for each in known for name in each if name != "out")
    return {
        name: [each.get(name) for each in settings]
        for name in names
        if any(each.get(name) != known[0].get(name) for each in known)
    }
