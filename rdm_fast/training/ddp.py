"""DistributedDataParallel around a method, set up from the configuration.

Gradients are averaged bucket by bucket, each as soon as backward has filled it. They are views into
the buckets, so the optimizer reads them without a copy.
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
    """The method wrapped in DistributedDataParallel; on one rank the method itself.

    Args:
        method: on `device`. The wrapper has no state of its own.
        config: its `parallel` is used.
        device: this rank's.
    """
    if world_size() == 1:
        return method
    parallel = config.parallel
    if parallel.static_graph:
        _register_outputs()
    # torch makes the first bucket smaller only if no size is given
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
    """Let torch find the tensors in a step's output.

    With a static graph, torch starts the first reduction from a node behind the output's tensors.
    In a dataclass that it does not know it finds none, and never averages any gradient.
    """
    from torch.export import register_dataclass

    for output in (StepOutput, Branches):
        register_dataclass(output)
