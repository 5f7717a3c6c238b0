"""Which engine computes a filter, and what happens after a batch on which gemm was not accurate.

`auto` takes the fastest engine that is accurate for the filter:

    filter                                               CPU     GPU
    s^2                                                  gemm    gemm
    others                                               eigh    gemm
    center, an unusual cutoff or an extreme exponent     eigh    eigh

On a CPU an eigendecomposition costs less than the forty products that avoid it; on a GPU it costs
more than all of them, and waits.

The gemm engine leaves a status word on the device. It is copied to the host without a wait, and
read before the next batch is filtered, when it has long arrived. A batch on which the engine was
not accurate does not train: its filter is zero, and so is its gradient. From the next step on,
`auto` uses eigh; with engine=gemm the next step ends the run.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.errors import Unavailable
from rdm_fast.filters.engines.gemm import LEAST_CUTOFF
from rdm_fast.runtime.distributed import world_size
from rdm_fast.runtime.host_copy import HostCopy
from rdm_fast.runtime.printing import warn
from rdm_kernels.filter_steps import INACCURATE


def choose(config: FilterConfig, device: torch.device) -> str:
    """The engine named by the configuration, or the one that `auto` starts with."""
    if config.engine != "auto":
        return config.engine
    if config.why_not_gemm:
        return "eigh"
    is_square = config.kind == "poly" and config.sigma == 2
    return "gemm" if is_square or device.type != "cpu" else "eigh"


class EngineSelector:
    """The engine of one filter: gives up gemm after a batch on which it was not accurate.

    Attributes:
        config: the filter.
        name: the engine in use, as in `filter.engine`; None until a device is known.
        failures: batches on which gemm was not accurate.
    """

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        self.name: str | None = None
        self.failures = 0
        self._pending: HostCopy | None = None
        self._recorded: Tensor | None = None  # status word that a CUDA graph writes

    def current(self, device: torch.device) -> str:
        """Name of the engine to use for the next batch on this device.

        While a CUDA graph is captured, nothing is read: the host may not wait then, and the graph
        would keep the engine anyway.

        Raises:
            Unavailable: filter.engine=gemm was not accurate on the last batch.
        """
        if self._pending and not _capturing(device):
            self._read_status()
        if self.name is None:
            self.name = choose(self.config, device)
        return self.name

    @property
    def applied(self) -> FilterConfig:
        """The filter with the cutoff of the engine in use, for measuring what it does."""
        least = LEAST_CUTOFF if self.name == "gemm" else 0.0
        return replace(self.config, cutoff=max(self.config.cutoff, least))

    def watch(self, status: Tensor | None) -> None:
        """Read this status word, [v] int32, before the next batch; None from other engines.

        A word of any rank counts on all: ranks with different engines would wait for each other.
        """
        if status is None:
            return
        if world_size() > 1:
            status = status & INACCURATE
            dist.all_reduce(status, op=dist.ReduceOp.MAX)
        if _capturing(status.device):
            self._recorded = status
        else:
            self._pending = HostCopy(status)

    def watch_replay(self) -> None:
        """`watch` the status word that the CUDA graph replayed last has written."""
        self.watch(self._recorded)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint; the last batch counts."""
        self._read_status()
        return {"name": self.name, "failures": self.failures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._pending = None
        self.name, self.failures = state["name"], state["failures"]

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model learns of its own batches only."""
        return self.__dict__ | {"_pending": None, "_recorded": None}

    def _read_status(self) -> None:
        if self._pending is None:
            return
        status, self._pending = self._pending.read(), None
        if not bool((status & INACCURATE).any()):
            return
        why = "filter.engine=gemm was not accurate on a batch (its residual is large)"
        if self.config.engine == "gemm":
            raise Unavailable(f"{why}: use filter.engine=eigh, or auto, which changes to eigh")
        self.failures += 1
        self.name = "eigh"
        warn(f"{why}; skipped this batch, switching to engine=eigh", stacklevel=3)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
