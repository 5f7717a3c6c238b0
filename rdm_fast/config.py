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

Kind = Literal["poly", "log", "log_1", "log_2"]
Location = Literal["online", "target"]
Basis = Literal["own", "online"]
Engine = Literal["auto", "gemm", "eigh", "reference"]
MethodName = Literal["simsiam", "byol", "symsimsiam"]
PredictorName = Literal["mlp", "spectral", "none"]
BackboneName = Literal["resnet8", "resnet18", "resnet34", "resnet50"]
Stem = Literal["imagenet", "cifar", "cifar_pad2"]
DataName = Literal["digits", "cifar10", "cifar100", "stl10", "fashion_mnist", "folder", "arrays"]
Precision = Literal["fp32", "bf16", "fp16"]
Interpolation = Literal["bilinear", "bicubic"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _probability(flag: str, value: float) -> None:
    _require(0 <= value <= 1, f"{flag}={value} is not a probability: give a number from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterConfig:
    """The spectral filter g, applied to the singular values s of a batch of projections."""

    kind: Kind = "poly"
    """g(s): poly is s^sigma, log is log s, log_1 is log(1 + s), log_2 is log(1 + s^2)."""
    location: Location = "online"
    """Branch that is filtered. RDM wants a rising g on the online one, a falling g on the target."""
    sigma: float = 1.0
    """Exponent of kind=poly; 0 filters nothing. The other kinds ignore it."""
    basis: Basis = "own"
    """Whose spectrum filters the target: its own, or the online branch's."""
    cutoff: float = 1e-3
    """Singular values up to this share of the largest are cut off (never under the input's noise)."""
    center: bool = False
    """Take the spectrum of the centred projections (covariance) instead of the raw correlation."""
    engine: Engine = "auto"
    """How the filter is computed: auto chooses, reference is the paper's literal SVD."""

    def __post_init__(self) -> None:
        _require(math.isfinite(self.sigma), f"filter.sigma={self.sigma} is not a finite number")
        _require(
            0 < self.cutoff < 1,
            f"filter.cutoff={self.cutoff} is not a share of the largest singular value: "
            "give a number between 0 and 1, such as 1e-3",
        )
        _require(
            self.basis == "own" or self.location == "target",
            "filter.basis=online concerns the target branch only: "
            "use filter.location=target, or leave filter.basis=own",
        )
        _require(
            not (self.center and self.engine == "reference"),
            "filter.engine=reference is the paper's formulation, which never centres: "
            "leave out filter.center, or use filter.engine=eigh",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images, and how they are read."""

    name: DataName = "digits"
    """Data set: digits is embedded, folder reads image files, arrays reads one packed .npz file."""
    root: str = "data"
    """Folder of the data set, in torchvision's layout; for arrays, the .npz file."""
    download: bool = False
    """Fetch the data set into root if it is not there (torchvision sets only)."""
    loader: Literal["auto", "torch", "resident"] = "auto"
    """torch decodes in worker processes, resident keeps pixels on the device; auto chooses."""
    workers: int = 2
    """Worker processes of the torch loader, on each rank."""

    def __post_init__(self) -> None:
        _require(self.workers >= 0, f"data.workers={self.workers}: give 0 or more processes")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """How one random view of an image is drawn. Steps run in the order of these fields."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the crop as a share of the image, drawn uniformly from this range."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, drawn log-uniformly from this range."""
    rotate: float = 0.0
    """Largest rotation, in degrees, either way."""
    shear: float = 0.0
    """Largest horizontal shear, in degrees, either way."""
    jitter: float = 0.0
    """Probability of colour jitter: brightness, contrast, saturation and hue in random order."""
    brightness: float = 0.4
    """Brightness factor is drawn from [1 - this, 1 + this]."""
    contrast: float = 0.4
    """Contrast factor is drawn from [1 - this, 1 + this]."""
    saturation: float = 0.4
    """Saturation factor is drawn from [1 - this, 1 + this]."""
    hue: float = 0.1
    """Hue is shifted by a share of the colour circle from [-this, this]."""
    grey: float = 0.0
    """Probability of dropping the colour."""
    blur: float = 0.0
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, in pixels, drawn uniformly from this range."""
    solarize: float = 0.0
    """Probability of inverting all pixels of 128 or more."""
    flip: float = 0.0
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        for name in ("jitter", "grey", "blur", "solarize", "flip"):
            _probability(f"augment.view.{name}", getattr(self, name))
        low, high = self.crop_scale
        _require(
            0 < low <= high <= 1,
            f"augment.view.crop_scale={self.crop_scale} is not a range of area shares: "
            "give two rising numbers in (0, 1]",
        )
        low, high = self.crop_ratio
        _require(0 < low <= high, f"augment.view.crop_ratio={self.crop_ratio} is not a rising range")
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            _require(
                0 <= value <= 1,
                f"augment.view.{name}={value}: give a number from 0 (none) to 1",
            )
        _require(
            0 <= self.hue <= 0.5,
            f"augment.view.hue={self.hue}: give a share of the colour circle from 0 to 0.5",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """The two views of an image and what they have in common."""

    size: int = 32
    """Side of a view, in pixels."""
    interpolation: Interpolation = "bilinear"
    """How the crop is resized (antialiased)."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, on a scale of 0 to 1, subtracted last. Its length is the channel count."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, divided by last."""
    view1: ViewConfig = field(default_factory=ViewConfig)
    view2: ViewConfig = field(default_factory=ViewConfig)

    def __post_init__(self) -> None:
        _require(self.size >= 8, f"augment.size={self.size}: a view has at least 8 pixels a side")
        _require(
            len(self.mean) == len(self.std) and len(self.mean) in (1, 3),
            f"augment.mean has {len(self.mean)} and augment.std {len(self.std)} channels: "
            "give 1 or 3 numbers to both",
        )

    @property
    def channels(self) -> int:
        return len(self.mean)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Backbone and heads."""

    backbone: BackboneName = "resnet18"
    """torchvision's ResNet-18, 34 or 50, or a small ResNet-8 for CPUs."""
    stem: Stem = "cifar"
    """First layers: imagenet (7x7, stride 2, max-pool), cifar (3x3), cifar_pad2 (the reference's)."""
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
    """End the projector with a batch norm without affine parameters (SimSiam does, BYOL does not)."""
    predictor_hidden: int = 512
    """Hidden width of the learned predictor, where there is one."""

    def __post_init__(self) -> None:
        _require(
            self.projector_layers in (2, 3),
            f"model.projector_layers={self.projector_layers}: a projector has 2 or 3 layers",
        )
        _require(
            self.backbone != "resnet8" or self.stem == "cifar",
            f"model.stem={self.stem} does not exist for model.backbone=resnet8: "
            "use model.stem=cifar, or a larger backbone such as resnet18",
        )
        for name in ("width", "projector_hidden", "projector_dim", "predictor_hidden"):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name}={value}: give 1 or more channels")


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
        for name in ("epochs", "global_batch", "accumulate"):
            value = getattr(self, name)
            _require(value >= 1, f"optim.{name}={value}: give 1 or more")
        for name in ("base_lr", "warmup_epochs", "warmup_lr", "final_lr", "weight_decay"):
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value >= 0,
                f"optim.{name}={value}: give a number of 0 or more",
            )
        for name in ("momentum", "ema_start", "ema_end"):
            _probability(f"optim.{name}", getattr(self, name))
        _require(
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
    """Epochs between two kNN evaluations of the backbone; 0 for none. The last epoch has one too."""
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
            _require(value >= 1, f"log.{name}={value}: give 1 or more")
        _require(self.knn_every >= 0, f"log.knn_every={self.knn_every}: give 0 (never) or more")
        _require(self.keep >= 2, f"log.keep={self.keep}: at least 2, one may be damaged")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run."""

    method: MethodName = "simsiam"
    """simsiam, byol (EMA target), or symsimsiam (symmetric control without predictor)."""
    predictor: PredictorName = "spectral"
    """What makes predictions from projections: a learned mlp, the spectral filter (RDM), or none."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    seed: int = 5
    """Seed of weights, data order and augmentation; with it a run is reproducible."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one, and says so."""
    precision: Precision = "fp32"
    """Arithmetic of backbone and heads: fp32, or autocast to bf16 or fp16 (with loss scaling)."""
    sync_bn: bool = True
    """With several ranks, take batch-norm statistics over the global batch."""
    out: str = "runs/default"
    """Run folder. The same command on an unfinished one resumes it."""

    def __post_init__(self) -> None:
        _require(
            (self.method == "symsimsiam") == (self.predictor == "none"),
            f"method={self.method} with predictor={self.predictor}: symsimsiam has predictor=none, "
            "simsiam and byol have predictor=mlp or predictor=spectral "
            "(spectral with filter.sigma=0 filters nothing)",
        )
        _require(self.seed >= 0, f"seed={self.seed}: give 0 or more")
