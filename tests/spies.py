"""What code does while a test watches: calls, operators, waits for a GPU, errors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def calls_of(patch: pytest.MonkeyPatch, owner: object, name: str) -> list[tuple[Any, ...]]:
    """The arguments by position of every call of owner.name from now on, which works as before."""
    calls: list[tuple[Any, ...]] = []
    real = getattr(owner, name)

    def recorded(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return real(*args, **options)

    patch.setattr(owner, name, recorded)
    return calls


class Operators(TorchDispatchMode):
    """Shows `see` every operator and its arguments before it runs."""

    def __init__(self, see: Callable[[Any, Any], object]) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.see(func, args)
        return func(*args, **(kwargs or {}))


def waits(operator: Any) -> bool:
    """Whether an operator copies a value from the device to Python."""
    return "_local_scalar_dense" in str(operator) or "nonzero" in str(operator)


@contextmanager
def refused(kind: type[Exception], *parts: str) -> Iterator[None]:
    """Expect an error whose message has all these parts."""
    with pytest.raises(kind) as caught:
        yield
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@contextmanager
def nothing_waits() -> Iterator[None]:
    """An error where the CPU would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
