"""Console output: one line that is redrawn on a terminal, plain lines elsewhere."""

import math
import os
import sys
import time
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rdm_fast.runtime.printing import print_line
from rdm_fast.telemetry.keys import Metrics, Value


@dataclass(frozen=True)
class Plan:
    """The length of a run, for its progress and remaining time."""

    total_steps: int
    steps_per_epoch: int
    global_batch: int
    resumed_step: int = 0


class ConsoleLine:
    """One line redrawn in place on a terminal, else a plain line for each log.

    NO_COLOR and TERM=dumb also select plain lines. Warnings, and metrics without a loss such as a
    kNN accuracy, always get a line of their own that stays.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._start = time.monotonic()
        self._live: Live | None = None
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
        if sys.stdout is not None and sys.stdout.isatty() and not plain:
            self._live = Live(console=Console(), auto_refresh=False)
            self._live.start()

    def log(self, step: int, metrics: Metrics) -> None:
        if "warning" in metrics:
            print_line(f"warning: {metrics['warning']}")
        elif "loss" not in metrics:
            print_line(f"step {step}  " + "  ".join(f"{k} {_short(v)}" for k, v in metrics.items()))
        else:
            self._show(progress_line(step, metrics, self._plan, time.monotonic() - self._start))

    def _show(self, line: str) -> None:
        if self._live is None:
            print_line(line)
        else:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def progress_line(step: int, metrics: Metrics, plan: Plan, elapsed: float) -> str:
    """The progress of a run in one ASCII line.

    Args:
        metrics: under `KEYS`; missing ones are left out.
        elapsed: seconds since the start or resume, with evaluation and saving. The remaining
            steps are assumed to take as long.
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
