"""What a run records, and when."""

from dataclasses import dataclass
from typing import Annotated

from rdm_fast.config.checks import MANY, Between, Count, CountOrNone, require_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is written while training, and how often."""

    every: Count = 10
    """Optimizer steps between two lines of metrics; only these steps wait for the device."""
    spectrum_every: CountOrNone = 50
    """Optimizer steps between two records of whole spectra (spectrum.jsonl); 0 for none."""
    knn_every: CountOrNone = 10
    """Epochs between two kNN evaluations, besides the one at the end; 0 for none."""
    knn_bank: Count = 20_000
    """Largest number of training images in the kNN bank, which bounds its memory."""
    probe: bool = False
    """Also train a linear classifier on the detached embeddings and log probe_top1 with the kNN.
    The run itself does not change."""
    save_every: Count = 500
    """Optimizer steps between two checkpoints; the last step is always saved."""
    keep: Annotated[int, Between(2, MANY)] = 2
    """Number of newest checkpoints to keep; at least 2, since one may be damaged."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the extra rdm-fast[tensorboard])."""
    wandb: bool = False
    """Also log to Weights & Biases (needs the extra rdm-fast[wandb])."""
    trackio: bool = False
    """Also log to trackio (needs the extra rdm-fast[trackio])."""
    max_nonfinite: Count = 5
    """Steps in a row with a non-finite loss or gradient, all skipped, before the run stops."""

    def __post_init__(self) -> None:
        require_fields("log.", self)
