"""What a run tells of itself: `metrics.jsonl` always, a console line, TensorBoard and W&B if asked.

`metrics.jsonl` holds one JSON object a line. The first is `{"environment": {...}}`; each later one
is flat, has `step`, and any of the keys in `KEYS`. JSON knows no NaN or infinity, so a value that
is not finite is written as null. A resumed run first drops the lines after the step it resumes
from, so the file's steps are those of an undisturbed run; if its environment is another one, a
line `{"environment": {...}, "resumed_step": n}` says so.

Only rank zero has writers. All others have a `Telemetry` without any, so nobody asks for the rank.
"""

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rdm_fast import durable
from rdm_fast.config import Config
from rdm_fast.errors import Unavailable
from rdm_fast.run_folder import RunFolder

KEYS = {
    "step": "optimizer steps done",
    "epoch": "passes over the data done, as a fraction",
    "loss": "of the last step, over the global batch",
    "lr": "learning rate of the last step",
    "ema_momentum": "momentum of the target weights in the last step",
    "images_per_s": "images of the global batch a second, since the line before",
    "data_wait_s": "seconds a step that the loop waited for data, since the line before",
    "filter_ms": "milliseconds a step in the spectral filter",
    "effective_rank/online": "directions the online projections use, from 1 to D",
    "effective_rank/target": "directions the target's use, after the filter",
    "effective_rank/projection": "directions the projections use before any filter",
    "rank_difference": "effective rank of the target minus that of the online branch",
    "std": "of the normalised projections times sqrt(D): 1 is spread out, 0 is collapse",
    "knn_top1": "accuracy of a kNN classifier on embeddings, in percent",
    "probe_top1": "accuracy of a linear probe on embeddings, in percent",
    "grad_norm": "Euclidean norm of the whole gradient",
    "skipped_steps": "steps skipped so far because something was not finite",
    "filter_failures": "batches so far on which filter.engine=gemm was not accurate",
    "gpu_mem_gib": "most GPU memory used so far, GiB",
}

Value = float | int | str | None
Metrics = Mapping[str, Value]
Item = TypeVar("Item")


class Writer(Protocol):
    """Takes the metrics of one moment somewhere."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How long a run is, which the console needs for its progress and remaining time."""

    total_steps: int
    steps_per_epoch: int
    global_batch: int
    resumed_step: int = 0


class Telemetry:
    """All writers of this rank, used as one."""

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        self._writers = writers

    @classmethod
    def open(
        cls, folder: RunFolder, config: Config, environment: dict[str, Any], plan: Plan
    ) -> Self:
        """The writers that a configuration asks for; none on ranks other than zero.

        Args:
            folder: where the files go. Lines and events after `plan.resumed_step` are dropped.
            environment: from `rdm_fast.environment.describe_environment`.

        Raises:
            Unavailable: TensorBoard or W&B is asked for and not installed.
        """
        if folder.rank != 0:
            return cls()
        writers: list[Writer] = []
        if config.log.tensorboard:
            writers.append(TensorBoard(folder.tensorboard, plan.resumed_step))
        if config.log.wandb:
            writers.append(WeightsAndBiases(folder, environment))
        writers.append(JsonLines(folder.metrics, environment, plan.resumed_step))
        writers.append(ConsoleLine(plan))
        return cls(writers)

    def log(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of a step. Values are Python numbers: whoever has a tensor decides
        when to wait for it. Log before saving a checkpoint of the same step, so that no resumed
        run lacks a line."""
        for writer in self._writers:
            writer.log(step, metrics)

    def close(self) -> None:
        """Flush everything, and give the console back."""
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- files and trackers ----------------------------------------------------------------------


class JsonLines:
    """`metrics.jsonl`: complete lines only, in the file as soon as they are logged.

    When the disk is full, lines wait in memory and are written when there is space again.
    """

    def __init__(self, path: Path, environment: dict[str, Any], resumed_step: int = 0) -> None:
        kept = [line for line in _read_lines(path) if _position(line) <= resumed_step]
        if not kept or "environment" not in kept[0]:
            kept = [{"environment": environment}, *kept]
        elif [r["environment"] for r in kept if "environment" in r][-1] != environment:
            kept.append({"environment": environment, "resumed_step": resumed_step})
        durable.replace(path, "".join(_line(record) for record in kept))
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._pending = b""
        self._warned = False

    def log(self, step: int, metrics: Metrics) -> None:
        self._pending += _line({"step": step, **metrics}).encode()
        try:
            written = self._file.write(self._pending)
            if written != len(self._pending):
                raise OSError(f"only {written} of {len(self._pending)} bytes were written")
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._size)  # no half line
            if not self._warned:
                print(f"warning: metrics.jsonl waits in memory: {error}", file=sys.stderr)
            self._warned = True
        else:
            self._size += written
            self._pending, self._warned = b"", False

    def close(self) -> None:
        self._file.close()


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole records; a kill or a power cut can leave a torn line, which is left out."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def _position(record: dict[str, Any]) -> float:
    """The step that a record belongs to; the first environment belongs to step 0."""
    missing = 0 if "environment" in record else math.inf
    return float(record.get("resumed_step", record.get("step", missing)))


class TensorBoard:
    """Event files, one scalar a key. Events after the resumed step are hidden by TensorBoard."""

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        module = _optional("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        for key, value in metrics.items():
            if isinstance(value, float | int):
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run that is continued under the same id when the training is."""

    def __init__(self, folder: RunFolder, environment: dict[str, Any]) -> None:
        self._run = _optional("wandb", "wandb").init(
            project="rdm-fast",
            id=folder.id,
            resume="allow",
            dir=str(folder.path),
            config=environment,
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _optional(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(
            f"--log.{extra} needs a package that is not installed: "
            f'pip install "rdm-fast[{extra}]", or leave --log.{extra} out'
        ) from error


# ---- time ------------------------------------------------------------------------------------


class Clock:
    """Time spent in steps and waiting for data, since it was last read."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Leave out what was done since the last step, such as an evaluation."""
        self._start, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def waits(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches; the time until each arrives counts as waiting."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self._waited += time.perf_counter() - before
            self._steps += 1
            yield batch

    def read(self, global_batch: int) -> dict[str, float]:
        """images_per_s and data_wait_s a step; starts over."""
        steps = max(1, self._steps)
        seconds = time.perf_counter() - self._start
        metrics = {
            "images_per_s": steps * global_batch / seconds,
            "data_wait_s": self._waited / steps,
        }
        self.restart()
        return metrics


# ---- console ---------------------------------------------------------------------------------


class ConsoleLine:
    """One line that is rewritten in place on a terminal, or one plain line a log elsewhere.

    Plain is also what NO_COLOR or TERM=dumb ask for. Metrics without a loss, such as a kNN
    accuracy, always get a line of their own that stays.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._start = time.monotonic()
        self._live: Live | None = None
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
        if sys.stdout.isatty() and not plain:
            self._live = Live(console=Console(), auto_refresh=False)
            self._live.start()

    def log(self, step: int, metrics: Metrics) -> None:
        if "loss" not in metrics:
            print(f"step {step}  " + "  ".join(f"{k} {_short(v)}" for k, v in metrics.items()))
            return
        line = progress_line(step, metrics, self._plan, time.monotonic() - self._start)
        if self._live is None:
            print(line, flush=True)
        else:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def progress_line(step: int, metrics: Metrics, plan: Plan, elapsed: float) -> str:
    """A moment of training in one ASCII line.

    Args:
        metrics: those of `KEYS` that are shown and there.
        elapsed: seconds since the run was started or resumed, evaluation and saving included;
            the remaining time takes the coming steps to cost as much as those.
    """
    epochs = math.ceil(plan.total_steps / plan.steps_per_epoch)
    parts = [f"epoch {math.ceil(step / plan.steps_per_epoch)}/{epochs}"]
    parts.append(f"step {step}/{plan.total_steps}")
    parts += [f"{key} {_short(metrics[key])}" for key in ("loss", "lr") if key in metrics]
    speed, wait = metrics.get("images_per_s"), metrics.get("data_wait_s")
    if isinstance(speed, float | int):
        parts.append(f"{speed:,.0f} images/s")
        if isinstance(wait, float | int):
            parts.append(f"data wait {100 * wait * speed / plan.global_batch:.0f}%")
    ranks = [metrics.get(f"effective_rank/{branch}") for branch in ("online", "target")]
    if None not in ranks:
        parts.append(f"effective rank {_short(ranks[0])} online, {_short(ranks[1])} target")
    done = step - plan.resumed_step
    if done > 0:
        parts.append(f"ETA {_clock(elapsed / done * (plan.total_steps - step))}")
    return "  ".join(parts)


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
