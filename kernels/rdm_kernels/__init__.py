"""The operations of rdm-fast, usable without the trainer.

Each op is defined by a plain PyTorch body, which runs anywhere. Where a Triton kernel exists, it
replaces the body on CUDA, so callers never choose. kernels/README.md has the contracts.
"""

from rdm_kernels.filter_factors import FilterFactors, filter_factors
from rdm_kernels.filtered_cosine import filtered_cosine
from rdm_kernels.gram import gram
from rdm_kernels.matrix_power import (
    matrix_inverse_sqrt,
    matrix_log,
    matrix_log1p,
    matrix_power,
    matrix_sqrt,
)
from rdm_kernels.neg_cosine import neg_cosine
from rdm_kernels.product import product
from rdm_kernels.prototype_loss import centered_softmax, prototype_logits, prototype_loss
from rdm_kernels.safe_eigh import Eigh, safe_eigh
from rdm_kernels.sinkhorn import sinkhorn
from rdm_kernels.sym_matmul import sym_matmul
from rdm_kernels.views.definition import pack_views
from rdm_kernels.views.op import augment_views

__all__ = [
    "Eigh",
    "FilterFactors",
    "augment_views",
    "centered_softmax",
    "filter_factors",
    "filtered_cosine",
    "gram",
    "matrix_inverse_sqrt",
    "matrix_log",
    "matrix_log1p",
    "matrix_power",
    "matrix_sqrt",
    "neg_cosine",
    "pack_views",
    "product",
    "prototype_logits",
    "prototype_loss",
    "safe_eigh",
    "sinkhorn",
    "sym_matmul",
]
