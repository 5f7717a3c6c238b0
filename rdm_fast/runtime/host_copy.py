"""The value of a small device tensor, read on the host without stalling the device."""

import torch
from torch import Tensor


class HostCopy:
    """A copy on the host of a tensor's current value in the stream's order.

    Creating it does not wait. `read` waits for the copy alone, which a step later has long ended.
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
