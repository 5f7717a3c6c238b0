"""The console: one line that is redrawn on a terminal, plain lines elsewhere."""

import math
import os
import sys
import time
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rdm_fast.telemetry.keys import Metrics, Value


@dataclass(frozen=True)
class Plan:
    """How long a run is, which the console needs for its progress and remaining time."""

    total_steps: int
    steps_per_epoch: int
    global_batch: int
    resumed_step: int = 0


class ConsoleLine:
    """One line that is rewritten in place on a terminal, or one plain line a log elsewhere.

    Plain is also what NO_COLOR or TERM=dumb ask for. Metrics without a loss, such as a kNN
    accuracy, and warnings always get a line of their own that stays.
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
        if "warning" in metrics:
            print(f"warning: {metrics['warning']}", flush=True)
        elif "loss" not in metrics:
            print(f"step {step}  " + "  ".join(f"{k} {_short(v)}" for k, v in metrics.items()))
        else:
            self._show(progress_line(step, metrics, self._plan, time.monotonic() - self._start))

    def _show(self, line: str) -> None:
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
