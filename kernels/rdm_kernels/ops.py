"""Registration of ops: a PyTorch body defines each, and a Triton launcher may run it on CUDA."""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


def define_op(name: str, body: Callable[..., Any]) -> "CustomOpDef":
    """The op `rdm::name`, which runs this body wherever no other kernel is registered.

    The body also runs on fake tensors, so what it returns must have the dtypes and strides of
    every other kernel: contiguous tensors, none of them a view of an input.
    """
    op = torch.library.custom_op(f"rdm::{name}", body, mutates_args=())
    op.register_fake(body)
    return op


def cuda_launcher(op: "CustomOpDef") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated launcher as the op's CUDA kernel.

    Triton launches on the current device, wherever the tensors are, so the launcher runs with the
    device of its first argument made current.
    """

    def register(launcher: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(launcher)
        def guarded(*args: Any, **options: Any) -> Any:
            with torch.cuda.device_of(args[0]):
                return launcher(*args, **options)

        op.register_kernel("cuda")(guarded)
        return guarded

    return register


def describe(**tensors: Tensor | None) -> str:
    """Dtypes and shapes, for an error message."""
    given = ((name, X) for name, X in tensors.items() if X is not None)
    return ", ".join(f"{name} {X.dtype} {tuple(X.shape)}" for name, X in given)
