"""The slowest part of a step, and which flags may speed it up.

A loader with its own processes or threads works while the device computes, so a step takes as long
as the slower of the two. A loader without them takes turns with the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rdm_fast.config import Config

Part = Literal["loader", "model", "filter"]
HALVES = ("bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Situation:
    """The facts behind a verdict."""

    config: Config
    seconds: Mapping[str, float]
    """Time of a batch, by stage; at least loader, model and `end to end`."""
    loader: str
    """Name of the loader in use, never `auto`."""
    engine: str
    """Name of the filter engine in use; `none` without a filter."""
    on_gpu: bool
    cpus: int
    """Cores that this process may use."""
    threads: int
    """Threads of torch's operations on a CPU."""
    fast_bf16: bool
    """Whether the device multiplies bf16 faster than fp32."""
    dali: str
    """How to install DALI; empty if it is installed."""


@dataclass(frozen=True)
class Verdict:
    bottleneck: Part
    why: str
    """The bottleneck's time beside those of the other parts."""
    advice: list[str]
    """What to try, most promising first."""


def verdict(situation: Situation) -> Verdict:
    """The bottleneck of a measured step."""
    seconds, config = situation.seconds, situation.config
    model, filter_ = seconds["model"], seconds.get("filter", 0.0)
    overlaps = situation.loader == "dali" or (
        situation.loader == "torch" and config.data.workers > 0
    )
    parts: dict[Part, float] = {"model": model, "filter": filter_}
    if not overlaps or seconds["loader"] > model + filter_:
        parts["loader"] = seconds["loader"]
    slowest = max(parts, key=lambda part: parts[part])
    why = (
        f"per batch: loader {_ms(seconds['loader'])}, model {_ms(model)}, filter {_ms(filter_)}, "
        f"whole step {_ms(seconds['end to end'])}; loader and device "
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
            return [
                "--optim.global-batch: larger, if memory allows; drawing views has a cost per batch"
            ]
        if now.cpus > 1:
            advice.append(
                f"--data.loader torch --data.workers {now.cpus}: worker processes then make views "
                "during the step"
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
        advice.insert(0, "--data.loader torch: its processes also apply colors during the step")
    return advice or ["smaller image files: this machine cannot decode these faster"]


def _filter_advice(now: Situation) -> list[str]:
    config = now.config.filter
    width, batch = now.config.model.projector_dim, now.config.optim.global_batch
    advice = []
    if config.engine != "auto":
        advice.append(f"--filter.engine auto: instead of {config.engine}")
    elif now.on_gpu and now.engine == "eigh" and config.why_not_gemm:
        advice.append(f"leave out {config.why_not_gemm}: matrix products alone then suffice")
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
        advice = ["more GPUs (--nproc gpu): data and filter keep up with this one"]
        if now.config.step.deterministic:
            advice.insert(
                0, "--step.no-deterministic: cuDNN's fastest convolutions, without exact resume"
            )
        if now.config.step.compile == "none":
            advice.insert(
                0, "--step.compile default: fewer, larger kernels, after a minute of compilation"
            )
        return advice
    if now.threads < now.cpus:
        return [
            f"OMP_NUM_THREADS={now.cpus}: torch uses {now.threads} of {now.cpus} cores; more is "
            "faster where no other program keeps them busy"
        ]
    return ["a GPU, or --model.backbone: smaller; data and filter keep up with this CPU"]
