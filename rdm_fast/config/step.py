"""How a step runs; nothing here changes what it computes, up to rounding."""

from dataclasses import dataclass
from typing import Literal

from rdm_fast.config.checks import require_fields

CompileMode = Literal["none", "default", "max-autotune"]
Switch = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepConfig:
    """How the device runs an optimizer step."""

    compile: CompileMode = "none"
    """torch.compile of backbone and heads: none, default, or max-autotune (tries many kernels)."""
    graph: Switch = "auto"
    """Replay the whole step as one CUDA graph: auto does so where possible, on requires it."""
    deterministic: bool = True
    """Use cuDNN's deterministic convolutions, which an exact resume on a GPU needs;
    --step.no-deterministic times all of them and takes the fastest."""

    def __post_init__(self) -> None:
        require_fields("step.", self)
