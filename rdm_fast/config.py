"""Every knob of a run, one frozen dataclass a concern.

A recipe (`rdm_fast.recipes`) is a function that returns a whole `Config`; the command line names
one and changes single fields: `python train.py digits_rdm_simsiam --optim.epochs 20`. The string
under a field is its help text. Derived values are properties, so they cannot disagree with their
sources. Nothing here imports torch: a command line is checked before torch is loaded.

Bad values raise `ValueError` naming the flag, what was found, and the way out.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from rdm_fast.data_config import (
    AugmentConfig,
    DataConfig,
    DataName,
    Interpolation,
    ViewConfig,
    require,
    require_choices,
    require_probability,
)
from rdm_fast.step_config import StepConfig

__all__ = [
    "AugmentConfig",
    "Config",
    "DataConfig",
    "DataName",
    "FilterConfig",
    "Interpolation",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "StepConfig",
    "ViewConfig",
]

Kind = Literal["poly", "log", "log_1", "log_2"]
Location = Literal["online", "target"]
Basis = Literal["own", "online"]
Engine = Literal["auto", "gemm", "eigh", "reference"]
MethodName = Literal["simsiam", "byol", "symsimsiam"]
PredictorName = Literal["mlp", "spectral", "none"]
BackboneName = Literal["resnet8", "resnet18", "resnet34", "resnet50"]
Stem = Literal["imagenet", "cifar", "cifar_pad2"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterConfig:
    """The spectral filter g, applied to the singular values s of a batch of projections."""

    kind: Kind = "poly"
    """g(s): poly is s^sigma, log is log s, log_1 is log(1 + s), log_2 is log(1 + s^2)."""
    location: Location = "online"
    """Branch that is filtered. RDM wants a rising g on the online one, a falling on the target."""
    sigma: float = 1.0
    """Exponent of kind=poly; 0 filters nothing. The other kinds ignore it."""
    basis: Basis = "own"
    """Whose spectrum filters the target: its own, or the online branch's."""
    cutoff: float = 1e-3
    """Singular values up to this share of the largest are cut off, and those of rounding noise."""
    center: bool = False
    """Take the spectrum of the centred projections (covariance) instead of the raw correlation."""
    engine: Engine = "auto"
    """How the filter is computed: auto chooses, reference is the paper's literal SVD."""

    def __post_init__(self) -> None:
        require_choices("filter.", self)
        require(math.isfinite(self.sigma), f"filter.sigma={self.sigma} is not a finite number")
        require(
            0 < self.cutoff < 1,
            f"filter.cutoff={self.cutoff} is not a share of the largest singular value: "
            "give a number between 0 and 1, such as 1e-3",
        )
        require(
            self.basis == "own" or self.location == "target",
            "filter.basis=online concerns the target branch only: "
            "use filter.location=target, or leave filter.basis=own",
        )
        require(
            not (self.center and self.engine == "reference"),
            "filter.engine=reference is the paper's formulation, which never centres: "
            "leave out filter.center, or use filter.engine=eigh",
        )
        require(
            self.engine != "gemm" or self.why_not_gemm is None,
            f"filter.engine=gemm cannot be accurate with {self.why_not_gemm}: "
            "use filter.engine=eigh, or auto, which takes it",
        )

    @property
    def is_falling(self) -> bool:
        """Whether g falls with s."""
        return self.kind == "poly" and self.sigma < 0

    @property
    def why_not_gemm(self) -> str | None:
        """What matrix products alone cannot do of this filter, if any."""
        if self.center:
            return "filter.center"
        if not 1e-4 <= self.cutoff <= 0.1:
            return f"filter.cutoff={self.cutoff:g} (it takes 1e-4 to 0.1)"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Backbone and heads."""

    backbone: BackboneName = "resnet18"
    """torchvision's ResNet-18, 34 or 50, or a small ResNet-8 for CPUs."""
    stem: Stem = "cifar"
    """First layers: imagenet (7x7, stride 2, max-pool), cifar (3x3), cifar_pad2 (RDM's code)."""
    width: int = 24
    """Channels of the first stage of resnet8; the others have their own widths."""
    zero_init_residual: bool = False
    """Start every residual branch at zero."""
    projector_layers: int = 3
    """Linear layers of the projector, 2 or 3."""
    projector_hidden: int = 2048
    """Width of the projector's hidden layers."""
    projector_dim: int = 2048
    """Width D of a projection."""
    projector_bn: bool = True
    """End the projector with a batch norm without affine parameters (SimSiam's, not BYOL's)."""
    predictor_hidden: int = 512
    """Hidden width of the learned predictor, where there is one."""

    def __post_init__(self) -> None:
        require_choices("model.", self)
        require(
            self.projector_layers in (2, 3),
            f"model.projector_layers={self.projector_layers}: a projector has 2 or 3 layers",
        )
        require(
            self.backbone != "resnet8" or self.stem == "cifar",
            f"model.stem={self.stem} does not exist for model.backbone=resnet8: "
            "use model.stem=cifar, or a larger backbone such as resnet18",
        )
        for name in ("width", "projector_hidden", "projector_dim", "predictor_hidden"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}={value}: give 1 or more channels")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """One optimizer step is the unit of everything: schedules, EMA, checkpoints, logs."""

    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    """SGD with momentum, LARS (SGD with layer-wise trust ratios), or AdamW."""
    epochs: int = 100
    """Passes over the data."""
    global_batch: int = 256
    """Images in one optimizer step, over all ranks and accumulated parts."""
    accumulate: int = 1
    """Parts in which each rank computes its share of a step, to save memory."""
    base_lr: float = 0.5
    """Learning rate for a global batch of 256; the step uses base_lr * global_batch / 256."""
    warmup_epochs: float = 10
    """Epochs of linear warm-up from warmup_lr; then a cosine down to final_lr."""
    warmup_lr: float = 3e-5
    """Learning rate of the first step, not scaled with the batch."""
    final_lr: float = 0.0
    """Learning rate at the end of the cosine, not scaled with the batch."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    weight_decay: float = 1e-5
    """Weight decay."""
    decay_norm_and_bias: bool = True
    """Decay 1-D parameters too (batch norm, biases). LARS then scales them as well."""
    lars_eta: float = 0.02
    """Trust coefficient of LARS."""
    lars_clip: bool = True
    """Never let LARS raise a layer's learning rate above the schedule's."""
    fixed_predictor_lr: bool = True
    """Keep the learned predictor's learning rate constant (SimSiam, section 4.2)."""
    ema_start: float = 0.99
    """Momentum of BYOL's target weights at the first step; rises to ema_end on a cosine."""
    ema_end: float = 1.0
    """Momentum of BYOL's target weights at the last step."""

    def __post_init__(self) -> None:
        require_choices("optim.", self)
        for name in ("epochs", "global_batch", "accumulate"):
            value = getattr(self, name)
            require(value >= 1, f"optim.{name}={value}: give 1 or more")
        for name in ("base_lr", "warmup_epochs", "warmup_lr", "final_lr", "weight_decay"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value >= 0,
                f"optim.{name}={value}: give a number of 0 or more",
            )
        for name in ("momentum", "ema_start", "ema_end"):
            require_probability(f"optim.{name}", getattr(self, name))
        require(
            self.warmup_epochs <= self.epochs,
            f"optim.warmup_epochs={self.warmup_epochs} is longer than "
            f"optim.epochs={self.epochs}: lower the first or raise the second",
        )

    @property
    def lr(self) -> float:
        """Peak learning rate of a step."""
        return self.base_lr * self.global_batch / 256

    def local_batch(self, world_size: int) -> int:
        """Images of one rank in one step; every accumulated part has the same size.

        Raises:
            ValueError: the global batch does not divide over ranks and parts.
        """
        parts = world_size * self.accumulate
        share, rest = divmod(self.global_batch, parts)
        if rest or share < 2:
            down, up = max(2, share) * parts, max(2, share + 1) * parts
            accumulated = f" of {self.accumulate} parts" if self.accumulate > 1 else ""
            near = str(down) if rest == 0 or down > self.global_batch else f"{down} or {up}"
            raise ValueError(
                f"optim.global_batch={self.global_batch} does not give each of {world_size} "
                f"rank(s){accumulated} the same 2 or more images: use {near}"
            )
        return share * self.accumulate


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is written while training, and how often."""

    every: int = 10
    """Optimizer steps between two lines of metrics, the only moments that wait for the device."""
    knn_every: int = 10
    """Epochs between two kNN evaluations, besides the one at the end; 0 for none at all."""
    knn_bank: int = 20_000
    """Most training images in the kNN bank, which bounds its memory."""
    save_every: int = 500
    """Optimizer steps between two checkpoints; the last step has one too."""
    keep: int = 2
    """Checkpoints kept, newest first; never fewer than 2."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the extra rdm-fast[tensorboard])."""
    wandb: bool = False
    """Also log to Weights & Biases (needs the extra rdm-fast[wandb])."""
    max_nonfinite: int = 5
    """Steps in a row with a non-finite loss or gradient, all skipped, before the run stops."""

    def __post_init__(self) -> None:
        for name in ("every", "save_every", "knn_bank", "max_nonfinite"):
            value = getattr(self, name)
            require(value >= 1, f"log.{name}={value}: give 1 or more")
        require(self.knn_every >= 0, f"log.knn_every={self.knn_every}: give 0 (never) or more")
        require(self.keep >= 2, f"log.keep={self.keep}: at least 2, one may be damaged")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run."""

    method: MethodName = "simsiam"
    """simsiam, byol (EMA target), or symsimsiam (symmetric control without predictor)."""
    predictor: PredictorName = "spectral"
    """What makes predictions from projections: a learned mlp, a spectral filter (RDM), or none."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    step: StepConfig = field(default_factory=StepConfig)
    log: LogConfig = field(default_factory=LogConfig)
    seed: int = 5
    """Seed of weights, data order and augmentation; with it a run is reproducible."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one, and says so."""
    precision: Precision = "fp32"
    """Arithmetic of backbone and heads: fp32, tf32 (fp32 with products of 10-bit factors on a GPU),
    or autocast to bf16 or fp16 (with loss scaling)."""
    sync_bn: bool = True
    """With several ranks, take batch-norm statistics over the global batch."""
    out: str = "runs/default"
    """Run folder. The same command on an unfinished one resumes it."""

    def __post_init__(self) -> None:
        require_choices("", self)
        require(
            (self.method == "symsimsiam") == (self.predictor == "none"),
            f"method={self.method} with predictor={self.predictor}: symsimsiam has predictor=none, "
            "simsiam and byol have predictor=mlp or predictor=spectral "
            "(spectral with filter.sigma=0 filters nothing)",
        )
        require(self.seed >= 0, f"seed={self.seed}: give 0 or more")
