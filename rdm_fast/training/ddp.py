"""One method on several ranks: how DistributedDataParallel averages their gradients.

The average is taken bucket by bucket, each as soon as backward has filled it. Gradients are views
into the buckets, so nothing is copied on the way to the optimizer.
"""

from functools import cache

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from rdm_fast.config import Config
from rdm_fast.config.parallel import DEFAULT_BUCKET_MB
from rdm_fast.methods import Branches, Method, StepOutput
from rdm_fast.runtime.distributed import world_size

COMPRESSION = {
    "bf16": default_hooks.bf16_compress_hook,
    "fp16": default_hooks.fp16_compress_hook,
}
"""Each casts a bucket, divides it by the number of ranks, sums it over them, and casts it back."""


def wrap(method: Method, config: Config, device: torch.device) -> nn.Module:
    """The method itself on one rank; on several, one whose backward averages gradients over them.

    Args:
        method: on `device`; its state stays the run's, the wrapper has none of its own.
        config: `parallel` and `optim.accumulate` matter.
        device: of this rank.
    """
    if world_size() == 1:
        return method
    parallel = config.parallel
    if parallel.static_graph:
        _register_outputs()
    # torch makes its first bucket smaller only where no size is asked for
    size = None if parallel.bucket_mb == DEFAULT_BUCKET_MB else parallel.bucket_mb
    wrapped = DistributedDataParallel(
        method,
        device_ids=[device] if device.type == "cuda" else None,
        bucket_cap_mb=size,
        gradient_as_bucket_view=True,
        static_graph=parallel.static_graph,
    )
    if parallel.compress != "none":
        wrapped.register_comm_hook(None, COMPRESSION[parallel.compress])
    return wrapped


@cache
def _register_outputs() -> None:
    """Let torch see the tensors in a step's output.

    With a static graph the first backward is reduced from a node it puts behind every tensor of
    the output. It finds none in a dataclass it does not know, and then never averages anything.
    """
    from torch.export import register_dataclass

    for output in (StepOutput, Branches):
        register_dataclass(output)
