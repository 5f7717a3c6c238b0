"""A GPU that is not there: tensors without data that claim to be on an H100, and their gradients.

Code runs on them as it would on a GPU, launchers of Triton kernels included.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


def address(x: Tensor) -> int:
    """Of a fake tensor: 16-byte aligned, and the same for views of the same data."""
    return x.untyped_storage()._cdata * 16 + x.storage_offset() * x.element_size()


@contextmanager
def fake_device() -> Iterator[None]:
    """Makes tensors in this context fake, and "cuda" an H100 that captures a CUDA graph.

    Use it in a process of its own: caches keep constants that are fake.
    """
    with ExitStack() as stack:
        for name, value in (
            ("torch.cuda.get_device_capability", lambda device=None: (9, 0)),
            ("torch.cuda.is_current_stream_capturing", lambda: True),
            ("torch.cuda.device_of", lambda tensor: nullcontext()),
        ):
            stack.enter_context(patch(name, value))
        stack.enter_context(patch.object(Tensor, "data_ptr", address))
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.interpret = False
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@contextmanager
def triton_calls(record: Callable[[Any], object]) -> Iterator[None]:
    """Calls `record` with each Triton kernel instead of running it."""

    def run(kernel: Any, *args: object, **launch: object) -> None:
        record(kernel)

    with patch.object(JITFunction, "run", run), patch.object(InterpretedFunction, "run", run):
        yield


@torch.no_grad()
def backward(loss: Tensor) -> dict[object, Tensor]:
    """Gradients of a scalar by its leaves' nodes; autograd's own engine wants a real device."""
    order: list[Any] = []
    seen = set()

    def visit(node: Any) -> None:
        if node is not None and node not in seen:
            seen.add(node)
            for child, _ in node.next_functions:
                visit(child)
            order.append(node)

    visit(loss.grad_fn)
    grads: dict[Any, list[Tensor | None]] = {
        node: [None] * len(node._input_metadata) for node in order
    }
    grads[loss.grad_fn] = [torch.ones_like(loss)]
    for node in reversed(order):
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        if not edges:
            continue
        if isinstance(node, BackwardCFunction):  # has an output for each argument, tensor or not
            out = as_tuple(node.apply(*grads.pop(node)))
            pairs = zip(out, node.needs_input_grad, strict=False)  # more for arguments left out
            out = [grad for grad, needed in pairs if needed]
        else:
            out = as_tuple(node(*grads.pop(node)))
            pairs = zip(out, node.next_functions, strict=True)
            out = [grad for grad, (child, _) in pairs if child is not None]
        for (child, k), grad in zip(edges, out, strict=True):
            if grad is not None:
                known = grads[child][k]
                grads[child][k] = grad if known is None else known + grad
    return {node: grad for node, (grad, *_) in grads.items() if grad is not None}


def as_tuple(out: object) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else (out,)
