"""Which part of a step is the slowest, and which flags may change that.

A loader with processes or threads of its own works while the device computes, so a step takes as
long as the slower of the two; one without them and the device take turns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rdm_fast.config import Config

Part = Literal["loader", "model", "filter"]
HALVES = ("bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What a verdict follows from."""

    config: Config
    seconds: Mapping[str, float]
    """Of a batch, by stage; at least loader, model and `end to end`."""
    loader: str
    """The one in use, never `auto`."""
    engine: str
    """Likewise the filter's; `none` without a filter."""
    on_gpu: bool
    cpus: int
    """That this process may use."""
    threads: int
    """Of torch's operations on a CPU."""
    fast_bf16: bool
    """Whether the device multiplies bf16 faster than fp32."""
    dali: str
    """The line that installs DALI; empty where it is installed."""


@dataclass(frozen=True)
class Verdict:
    bottleneck: Part
    why: str
    """The bottleneck's time beside the others'."""
    advice: list[str]
    """What to try, the most promising first; empty if no flag helps."""


def verdict(situation: Situation) -> Verdict:
    """The bottleneck of a step that was measured."""
    seconds, config = situation.seconds, situation.config
    device = seconds["model"] + seconds.get("filter", 0.0)
    overlaps = situation.loader == "dali" or (
        situation.loader == "torch" and config.data.workers > 0
    )
    parts: dict[Part, float] = {"model": seconds["model"], "filter": seconds.get("filter", 0.0)}
    if not overlaps or seconds["loader"] > device:
        parts["loader"] = seconds["loader"]
    slowest = max(parts, key=lambda part: parts[part])
    rival = f"model {_ms(seconds['model'])}, filter {_ms(seconds.get('filter', 0.0))}"
    why = (
        f"a batch takes the loader {_ms(seconds['loader'])}, {rival}, a whole step "
        f"{_ms(seconds['end to end'])}; loader and device "
        + ("work at the same time" if overlaps else "take turns")
    )
    advise = {"loader": _loader_advice, "model": _model_advice, "filter": _filter_advice}
    return Verdict(slowest, why, advise[slowest](situation))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _loader_advice(now: Situation) -> list[str]:
    workers = now.config.data.workers
    advice = []
    if now.loader == "resident":
        if now.on_gpu:
            return ["--optim.global-batch: larger, if memory allows; drawing views costs per batch"]
        if now.cpus > 1:
            advice.append(
                f"--data.loader torch --data.workers {now.cpus}: views are then made beside the "
                "step, in processes"
            )
        return advice
    if workers < now.cpus:
        device = now.seconds["model"] + now.seconds.get("filter", 0.0)
        needed = round(max(1, workers) * now.seconds["loader"] / device)
        what = "threads" if now.loader == "dali" else "processes"
        more = min(now.cpus, max(workers + 1, needed))
        advice.append(f"--data.workers {more}: {what} that decode, {workers} now")
    if now.loader == "torch" and now.on_gpu:
        first = f"first {now.dali}; then " if now.dali else ""
        advice.insert(0, f"{first}--data.loader dali: decodes on the GPU")
    if now.loader == "dali" and not now.on_gpu:
        advice.insert(0, "--data.loader torch: its processes make colors, too, beside the step")
    return advice or ["smaller image files: this machine decodes these no faster"]


def _filter_advice(now: Situation) -> list[str]:
    config = now.config.filter
    width, batch = now.config.model.projector_dim, now.config.optim.global_batch
    advice = []
    if config.engine != "auto":
        advice.append(f"--filter.engine auto: instead of {config.engine}")
    elif now.on_gpu and now.engine == "eigh" and config.why_not_gemm:
        advice.append(f"leave out {config.why_not_gemm}: matrix products alone then do")
    smaller = "--model.projector-dim" if width < batch else "--optim.global-batch"
    advice.append(
        f"{smaller}: smaller; the filter's cost grows with the cube of the smaller of batch "
        f"({batch}) and width ({width})"
    )
    return advice


def _model_advice(now: Situation) -> list[str]:
    precision = now.config.precision
    if precision not in HALVES and (now.on_gpu or now.fast_bf16):
        return [f"--precision bf16: instead of {precision}"]
    if now.on_gpu:
        more = "more GPUs (torchrun): data and filter keep up with this one"
        if now.config.step.compile == "none":
            return ["--step.compile default: fewer and larger kernels, after a minute", more]
        return [more]
    if now.threads < now.cpus:
        return [
            f"OMP_NUM_THREADS={now.cpus}: torch uses {now.threads} of {now.cpus} cores; more is "
            "faster where no other program keeps them busy"
        ]
    return ["a GPU, or --model.backbone: smaller; data and filter keep up with this CPU"]
