"""The operations of rdm-fast, usable without the trainer.

Each op is defined by a plain PyTorch body, which runs anywhere; Triton registers itself as the
op's CUDA kernel where there is one, so callers never choose. kernels/README.md has the contracts.
"""

from rdm_kernels.filtered_cosine import filtered_cosine
from rdm_kernels.neg_cosine import neg_cosine

__all__ = ["filtered_cosine", "neg_cosine"]
