"""The prototypes of DINO and SwAV."""

from dataclasses import dataclass
from typing import Annotated, Literal

from rdm_fast.config.checks import Between, Share, require, require_fields

Centring = Literal["mean", "sinkhorn", "none"]
Temperature = Annotated[float, Between(0.01, 10)]
Epochs = Annotated[float, Between(0, 10**6)]
SHARPEST = 0.03
"""Smallest temperature of Sinkhorn: float32 holds exp(-2 / SHARPEST)."""
TEACHER = ("teacher_temp_start", "teacher_temp", "teacher_temp_epochs")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrototypesConfig:
    """The prototypes of method=dino and swav, and how targets are made from them."""

    count: Annotated[int, Between(2, 2**20)] = 4096
    """Number K of prototypes."""
    frozen_epochs: Epochs = 1.0
    """Epochs, from the first, in which the prototypes do not move."""
    temperature: Temperature = 0.1
    """Temperature of the online branch's softmax: the number by which cosines are divided."""
    teacher_temp_start: Temperature = 0.04
    """Temperature of DINO's targets at the first step."""
    teacher_temp: Temperature = 0.04
    """Temperature of DINO's targets after teacher_temp_epochs; above 0.07 is unstable."""
    teacher_temp_epochs: Epochs = 0.0
    """Epochs in which it goes from the first to the second, linearly."""
    centring: Centring = "mean"
    """How prototypes are kept in equal use: mean subtracts a moving average of the targets' logits
    (DINO), sinkhorn assigns the whole batch (SwAV, DINOv2), none does nothing and collapses."""
    center_momentum: Share = 0.9
    """Share of that average that is kept in a step."""
    epsilon: Temperature = 0.05
    """Temperature of SwAV's targets, a number of at least 0.03 with sinkhorn."""
    iterations: Annotated[int, Between(1, 1000)] = 3
    """Number of Sinkhorn's iterations."""
    queue: Annotated[int, Between(0, 2**24)] = 0
    """Earlier rows of each view that Sinkhorn assigns together with the batch, a multiple of
    optim.global_batch; for SwAV with batches smaller than count."""
    queue_epoch: Epochs = 0.0
    """Epoch from which they take part, once there are enough."""

    def __post_init__(self) -> None:
        require_fields("prototypes.", self)

    def check(self, method: str, batch: int) -> None:
        """Check what the method, dino or swav, and the global batch ask of these settings.

        Raises:
            UsageError: a setting is for the other method, or does not fit the batch.
        """
        sinkhorn, default = self.centring == "sinkhorn", PrototypesConfig()
        if method == "swav":
            for name in TEACHER:
                require(
                    getattr(self, name) == getattr(default, name),
                    f"prototypes.{name} is for method=dino: with method=swav, leave it out and "
                    "give prototypes.epsilon",
                )
            require(
                self.centring != "mean",
                "prototypes.centring=mean is for method=dino: with method=swav, use "
                "--prototypes.centring sinkhorn",
            )
        coldest = {
            "epsilon": self.epsilon if method == "swav" else SHARPEST,
            "teacher_temp": min(self.teacher_temp, self.teacher_temp_start),
        }
        for name, value in coldest.items():
            require(
                not sinkhorn or value >= SHARPEST,
                f"prototypes.{name}={value:g} with prototypes.centring=sinkhorn is beyond float32: "
                f"give {SHARPEST} or more",
            )
        require(
            not self.queue or (method == "swav" and sinkhorn),
            f"prototypes.queue={self.queue} needs method=swav with prototypes.centring=sinkhorn: "
            "leave it out",
        )
        whole = self.queue // batch * batch
        near = f"{whole} or {whole + batch}" if whole else f"{batch}"
        require(
            self.queue == whole,
            f"prototypes.queue={self.queue} is not a multiple of optim.global_batch={batch}: use "
            f"{near}",
        )

    @property
    def warning(self) -> str | None:
        """What RDM says against DINO's temperatures, if anything."""
        if self.teacher_temp < self.temperature:
            return None
        return (
            f"prototypes.teacher_temp={self.teacher_temp:g} is not below prototypes.temperature="
            f"{self.temperature:g}: targets flatter than the online branch have a lower rank; "
            "lower the first"
        )
