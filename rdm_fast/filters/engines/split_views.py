"""Filters of two views on two ranks: each rank computes one, and they exchange results.

Every rank holds both views and could compute both filters. From n = SMALLEST on, sending the
results takes less time than computing them. The results are sent byte by byte, so every
rank has the bits it would have computed itself.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rdm_fast.runtime.distributed import rank, world_size

SMALLEST = 1024
"""Side n of the matrices from which on views are computed on different ranks."""

Result = TypeVar("Result", bound=tuple[Tensor, ...])


def split_views_across_ranks(function: Callable[..., Result], *batches: Tensor) -> Result:
    """function(*batches), with each view computed on another rank where that is faster.

    Args:
        function: acts on each view alone and returns a named tuple of tensors [v, ...] without
            gradient. It may be called with one view, [1, ...].
        batches: [v, ...] each, the same on every rank; the first has n as its smaller side.
    """
    v, n = len(batches[0]), min(batches[0].shape[1:])
    if v == 1 or n < SMALLEST or world_size() < v:
        return function(*batches)
    mine = rank() % v  # further ranks would only wait; their results are replaced
    own = function(*(batch[mine : mine + 1] for batch in batches))
    sent = torch.cat([field.contiguous().flatten().view(torch.uint8) for field in own])
    received = [sent if view == mine else torch.empty_like(sent) for view in range(v)]
    for view, message in enumerate(received):
        dist.broadcast(message, src=view)
    sizes = [field.numel() * field.element_size() for field in own]
    pieces = zip(*(message.split(sizes) for message in received), strict=True)
    fields = (
        torch.cat(piece).view(field.dtype).view(v, *field.shape[1:])
        for field, piece in zip(own, pieces, strict=True)
    )
    return type(own)(*fields)
