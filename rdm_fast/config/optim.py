"""The optimizer, its schedule, and the batch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from rdm_fast.config.checks import Between, Share, require, require_fields
from rdm_fast.config.flags import Alias
from rdm_fast.errors import UsageError

Rate = Annotated[float, Between(0, 1e6)]
Parts = Annotated[int, Between(1, 2**20)]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimizer, its schedule, and the batch of one optimizer step."""

    optimizer: Literal["sgd", "lars", "adamw", "lamb"] = "sgd"
    """SGD with momentum, LARS (SGD with layer-wise trust ratios), AdamW, or apex's LAMB."""
    backend: Literal["torch", "apex"] = "torch"
    """torch's optimizers (LARS is part of rdm-fast), or NVIDIA apex's fused sgd, adamw or lamb."""
    epochs: Annotated[int, Between(1, 10**6), Alias("--epochs")] = 100
    """Passes over the data."""
    global_batch: Annotated[Parts, Alias("--batch-size")] = 256
    """Images in one optimizer step, over all ranks and accumulated parts."""
    accumulate: Parts = 1
    """Parts in which each rank computes its share of a step, to save memory."""
    base_lr: Annotated[Rate, Alias("--lr")] = 0.5
    """Learning rate for a global batch of 256; the step uses base_lr * global_batch / 256."""
    warmup_epochs: Rate = 10
    """Epochs of linear warm-up from warmup_lr; then a cosine down to final_lr."""
    warmup_lr: Rate = 3e-5
    """Learning rate of the first step, not scaled with the batch."""
    final_lr: Rate = 0.0
    """Learning rate at the end of the cosine, not scaled with the batch."""
    momentum: Annotated[Share, Alias("--momentum")] = 0.9
    """Momentum of SGD and LARS."""
    weight_decay: Annotated[Rate, Alias("--wd")] = 1e-5
    """Weight decay of the first step."""
    weight_decay_end: Annotated[float, Between(-1, 1e6)] = -1.0
    """Weight decay at the last step, on a cosine from weight_decay; negative: as weight_decay."""
    decay_norm_and_bias: bool = True
    """Decay all parameters. Otherwise norms, biases, positional embeddings and class tokens are not
    decayed, nor scaled by LARS."""
    clip_norm: Rate = 0.0
    """Largest norm of a step's whole gradient; a longer one is scaled down. 0 is off."""
    clip_each: Rate = 0.0
    """Largest norm of each parameter's gradient in a step, as in DINO. 0 is off."""
    lars_eta: Annotated[float, Between(0, 1e6, above=True)] = 0.02
    """Trust coefficient of LARS."""
    lars_clip: bool = True
    """Never let LARS raise a layer's learning rate above the schedule's."""
    fixed_predictor_lr: bool = True
    """Keep the learned predictor's learning rate constant (SimSiam, section 4.2)."""
    ema_start: Share = 0.99
    """Momentum of BYOL's target weights at the first step; rises to ema_end on a cosine."""
    ema_end: Share = 1.0
    """Momentum of BYOL's target weights at the last step."""

    def __post_init__(self) -> None:
        require_fields("optim.", self)
        require(
            self.optimizer != "lamb" or self.backend == "apex",
            "optim.optimizer=lamb exists in NVIDIA apex only: add optim.backend=apex, or use lars",
        )
        require(
            self.optimizer != "lars" or self.backend == "torch",
            "optim.backend=apex has no lars: use optim.backend=torch, or optim.optimizer=lamb",
        )
        require(
            not (self.clip_norm and self.clip_each),
            f"optim.clip_norm={self.clip_norm} and optim.clip_each={self.clip_each} exclude each "
            "other: set one of them to 0",
        )
        require(
            self.warmup_epochs <= self.epochs,
            f"optim.warmup_epochs={self.warmup_epochs} is longer than "
            f"optim.epochs={self.epochs}: lower the first or raise the second",
        )

    @property
    def lr(self) -> float:
        """Peak learning rate of a step."""
        return self.base_lr * self.global_batch / 256

    @property
    def last_weight_decay(self) -> float:
        """Where the schedule of the weight decay ends."""
        return self.weight_decay if self.weight_decay_end < 0 else self.weight_decay_end

    def local_batch(self, world_size: int) -> int:
        """Images of one rank in one step; every accumulated part has the same size.

        Raises:
            UsageError: the global batch does not divide over ranks and parts.
        """
        parts = world_size * self.accumulate
        share, rest = divmod(self.global_batch, parts)
        if rest or share < 2:
            down, up = max(2, share) * parts, max(2, share + 1) * parts
            accumulated = f" of {self.accumulate} parts" if self.accumulate > 1 else ""
            near = str(down) if rest == 0 or down > self.global_batch else f"{down} or {up}"
            raise UsageError(
                f"optim.global_batch={self.global_batch} does not give each of {world_size} "
                f"rank(s){accumulated} the same 2 or more images: use {near}"
            )
        return share * self.accumulate
