"""The operations of rdm-fast, usable without the trainer.

Each op is defined by a plain PyTorch body, which runs anywhere; Triton registers itself as the
op's CUDA kernel where there is one, so callers never choose. kernels/README.md has the contracts.
"""

from rdm_kernels.filtered_cosine import filtered_cosine
from rdm_kernels.gram import gram
from rdm_kernels.neg_cosine import neg_cosine
from rdm_kernels.sym_matmul import sym_matmul

__all__ = ["filtered_cosine", "gram", "neg_cosine", "sym_matmul"]
