"""A small device tensor's value, read on the host without making the device wait for it."""

import torch
from torch import Tensor


class HostCopy:
    """The value that a tensor has in the stream's order now, for the host to read later.

    Copying it does not wait. `read` waits for that copy alone, so whoever reads a step later
    finds it there.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if tensor.device.type == "cpu":
            self._value = tensor.clone()
            return
        self._value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._value.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def read(self) -> Tensor:
        """The value, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value
