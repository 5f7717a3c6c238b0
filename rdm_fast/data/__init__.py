"""From image bytes to normalised views on the device."""

from rdm_fast.data.batch import Batch, Loader
from rdm_fast.data.images import ImageSet
from rdm_fast.data.loader import build_loader, evaluation_batches
from rdm_fast.data.sources import load, require_same_images

__all__ = [
    "Batch",
    "ImageSet",
    "Loader",
    "build_loader",
    "evaluation_batches",
    "load",
    "require_same_images",
]
