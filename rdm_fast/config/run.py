"""A whole run."""

from dataclasses import dataclass, field
from typing import Literal

from rdm_fast.config.checks import Seed, require, require_fields
from rdm_fast.config.data import AugmentConfig, DataConfig
from rdm_fast.config.filter import FilterConfig
from rdm_fast.config.guard import GuardConfig
from rdm_fast.config.log import LogConfig
from rdm_fast.config.model import ModelConfig
from rdm_fast.config.optim import OptimConfig
from rdm_fast.config.parallel import ParallelConfig
from rdm_fast.config.prototypes import PrototypesConfig
from rdm_fast.config.step import StepConfig

MethodName = Literal["simsiam", "byol", "dino", "swav", "symsimsiam"]
PredictorName = Literal["mlp", "spectral", "none"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Branch = Literal["online", "target"]
PREDICTORS: dict[MethodName, tuple[PredictorName, ...]] = {
    "simsiam": ("mlp", "spectral"),
    "byol": ("mlp", "spectral"),
    "dino": ("none", "spectral"),
    "swav": ("none", "spectral"),
    "symsimsiam": ("none",),
}
"""What each method's predictor can be."""
EMA: dict[MethodName, Branch] = {"byol": "online", "dino": "target"}
"""Methods with target weights of their own, and the branch that evaluation and export take."""
NEEDS_LESS = (
    "--optim.global-batch, --augment.size, --model.width, --model.projector-hidden or "
    "--model.projector-dim"
)
"""The flags that lower how much memory a run needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run."""

    method: MethodName = "simsiam"
    """simsiam, byol (EMA target), dino and swav (prototypes), or symsimsiam (symmetric control)."""
    predictor: PredictorName = "spectral"
    """Maps projections to predictions: a learned mlp, a spectral filter (RDM), or none."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    prototypes: PrototypesConfig = field(default_factory=PrototypesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    step: StepConfig = field(default_factory=StepConfig)
    log: LogConfig = field(default_factory=LogConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    seed: Seed = 5
    """Seed of weights, data order and augmentation; makes a run reproducible."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a GPU if there is one."""
    precision: Precision = "fp32"
    """Arithmetic of backbone and heads: fp32, tf32 (fp32 with products of 10-bit factors on a GPU),
    or autocast to bf16 or fp16 (with loss scaling)."""
    sync_bn: bool = True
    """With several ranks, compute batch-norm statistics over the global batch."""
    out: str = "runs/default"
    """Run folder. The same command resumes an unfinished run."""

    def __post_init__(self) -> None:
        require_fields("", self)
        require(
            self.predictor in PREDICTORS[self.method],
            f"method={self.method} with predictor={self.predictor}: symsimsiam has predictor=none, "
            "dino and swav predictor=none or predictor=spectral, simsiam and byol predictor=mlp or "
            "predictor=spectral (spectral with filter.sigma=0 filters nothing)",
        )
        require(
            self.augment.small_views == 0 or self.method != "symsimsiam",
            f"augment.small_views={self.augment.small_views} with method=symsimsiam: small views "
            "are for the online branch, and its branches are alike; give 0",
        )
        if self.method in ("dino", "swav"):
            self.prototypes.check(self.method, self.optim.global_batch)
            self._check_filtered_prototypes()
        require(
            not (self.parallel.static_graph and self.optim.accumulate > 1),
            "parallel.static_graph needs every backward pass to be alike, which optim.accumulate="
            f"{self.optim.accumulate} prevents: leave one of them out",
        )

    def _check_filtered_prototypes(self) -> None:
        spectral, filtered = self.filter, self.predictor == "spectral"
        require(
            not filtered or spectral.basis == "own",
            f"filter.basis={spectral.basis} with method={self.method}: use --filter.basis own",
        )
        require(
            not filtered or spectral.location == "target" or self.optim.accumulate == 1,
            f"filter.location=online with method={self.method} and optim.accumulate="
            f"{self.optim.accumulate}: each part would be filtered by itself; accumulate 1",
        )

    @property
    def has_target(self) -> bool:
        """Whether the method keeps target weights, a moving average of the online ones."""
        return self.method in EMA

    def branch(self, asked: Branch | Literal["auto"] = "auto") -> Branch:
        """The branch that evaluation and export take; auto is the method's.

        Raises:
            UsageError: it is the target of a method without target weights.
        """
        require(
            asked != "target" or self.has_target,
            f"--branch target: a run with method={self.method} has no target weights: leave out "
            "--branch",
        )
        return EMA.get(self.method, "online") if asked == "auto" else asked
