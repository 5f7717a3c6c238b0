"""Labeled embeddings for tests of probes."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

Labeled = tuple[Tensor, Tensor]


def digits(test: int = 397) -> tuple[Labeled, Labeled]:
    """Pixels in [0, 1] and labels of the 1797 digits, shuffled: a training and a test set."""
    pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    X, Y = pixels[order].float() / 16, labels[order]
    return (X[test:], Y[test:]), (X[:test], Y[:test])


def blobs(n: int = 120, d: int = 5, classes: int = 3) -> Labeled:
    """One Gaussian for each class; they overlap."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % classes
    centers = torch.randn(classes, d, generator=generator)
    return centers[labels] + torch.randn(n, d, generator=generator), labels
