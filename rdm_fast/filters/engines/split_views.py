"""Matrix functions of two views on two ranks: each computes one, and they are exchanged.

Every rank holds both views' Gram matrices, and could compute both functions of them; from n =
SMALLEST on, sending n^2 numbers takes less time than computing them. What is sent are the very
bytes, so every rank has the same results, and the same as if it had computed them.
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
    """function(*batches), whose views are computed on different ranks where that is faster.

    Args:
        function: acts on each view alone, and returns a named tuple of tensors [v, ...], without
            gradient. It may be called on one view, [1, ...].
        batches: [v, ...] each, the same on every rank; the first is [v, n, n].
    """
    v, n = batches[0].shape[:2]
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
