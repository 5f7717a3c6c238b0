"""From image bytes to normalized views on the device."""

from rdm_fast.data.images.datasets import load, require_same_images
from rdm_fast.data.images.sets import ImageSet
from rdm_fast.data.loaders.batch import Batch, Loader
from rdm_fast.data.loaders.build import build_loader
from rdm_fast.data.loaders.evaluation import evaluation_batches

__all__ = [
    "Batch",
    "ImageSet",
    "Loader",
    "build_loader",
    "evaluation_batches",
    "load",
    "require_same_images",
]
