"""cuDNN's choice among its algorithms for a convolution."""

import torch


def choose_algorithms(*, deterministic: bool) -> None:
    """Choose deterministic algorithms for all that follows, or the fastest.

    The fastest are found by timing each shape once (torch.backends.cudnn.benchmark). They may sum
    in another order in every run, so a resumed run no longer ends with the same bits. Without a GPU
    this has no effect.
    """
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
