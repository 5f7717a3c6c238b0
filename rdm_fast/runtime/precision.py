"""Precision of backbone and heads, by name.

fp32   float32
tf32   float32; on a GPU, factors of products are rounded to 10 bits
bf16   autocast to bfloat16
fp16   autocast to float16, with loss scaling
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rdm_fast.config import Precision

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of_views(precision: Precision, device: torch.device) -> torch.dtype:
    """Dtype of the views: on a GPU, that to which autocast would round them."""
    return HALVES.get(precision, torch.float32) if device.type == "cuda" else torch.float32


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Context of a forward pass."""
    return torch.autocast(device.type, dtype=HALVES.get(precision), enabled=precision in HALVES)


@contextmanager
def float32_products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Context of forward and backward pass: how a GPU multiplies float32 values.

    torch's defaults differ: tf32 in convolutions, float32 in matrix products. Here both follow
    `precision`, and the context restores the defaults.
    """
    if device.type != "cuda":
        yield
        return
    places = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
