"""Float32 products as tensor cores form them, emulated on a CPU."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Truncated(TorchDispatchMode):
    """Float32 products of PyTorch as three of operands that are truncated to 10 bits."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if op not in (aten.mm.default, aten.bmm.default) or args[0].dtype != torch.float32:
            return op(*args, **(kwargs or {}))
        high = [truncated(x) for x in args]
        low = [truncated(x - h) for x, h in zip(args, high, strict=True)]
        return op(high[0], low[1]) + op(low[0], high[1]) + op(*high)


def truncated(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@contextmanager
def tf32x3() -> Iterator[None]:
    """The products of the gemm engine as tensor cores form them, on a CPU."""
    with ExitStack() as stack:
        for name in ("gram", "sym_matmul", "product"):  # the bodies alone, whose products are seen
            module = sys.modules[f"rdm_kernels.{name}"]
            body = getattr(module, f"define_{name}")
            stack.enter_context(patch.object(module, f"{name}_op", body))
        stack.enter_context(Truncated())
        yield
