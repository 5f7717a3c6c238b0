"""What a run tells, and when."""

from dataclasses import dataclass

from rdm_fast.config.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is written while training, and how often."""

    every: int = 10
    """Optimizer steps between two lines of metrics, the only moments that wait for the device."""
    spectrum_every: int = 50
    """Optimizer steps between two records of whole spectra (spectrum.jsonl); 0 for none at all."""
    knn_every: int = 10
    """Epochs between two kNN evaluations, besides the one at the end; 0 for none at all."""
    knn_bank: int = 20_000
    """Most training images in the kNN bank, which bounds its memory."""
    probe: bool = False
    """Train a linear classifier on the detached embeddings meanwhile; probe_top1 is logged with the
    kNN. It changes nothing of the run."""
    save_every: int = 500
    """Optimizer steps between two checkpoints; the last step has one too."""
    keep: int = 2
    """Checkpoints kept, newest first; never fewer than 2."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the extra rdm-fast[tensorboard])."""
    wandb: bool = False
    """Also log to Weights & Biases (needs the extra rdm-fast[wandb])."""
    trackio: bool = False
    """Also log to trackio (needs the extra rdm-fast[trackio])."""
    max_nonfinite: int = 5
    """Steps in a row with a non-finite loss or gradient, all skipped, before the run stops."""

    def __post_init__(self) -> None:
        for name in ("every", "save_every", "knn_bank", "max_nonfinite"):
            value = getattr(self, name)
            require(value >= 1, f"log.{name}={value}: give 1 or more")
        for name in ("knn_every", "spectrum_every"):
            value = getattr(self, name)
            require(value >= 0, f"log.{name}={value}: give 0 (never) or more")
        require(self.keep >= 2, f"log.keep={self.keep}: at least 2, one may be damaged")
