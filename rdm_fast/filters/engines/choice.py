"""Which engine computes a filter, and what happens when matrix products were not accurate enough.

`auto` takes the fastest engine that is accurate for the filter:

    filter                              CPU     GPU     GPU with slow float64
    s^2                                 gemm    gemm    gemm
    online log s, or falling            eigh    gemm    eigh
    others                              eigh    gemm    gemm
    center, or an unusual cutoff        eigh    eigh    eigh

On a CPU an eigendecomposition costs less than the fifty products that avoid it; on a GPU it costs
more than all of them, and waits. The second row's products are of float64.

The gemm engine leaves a status word on the device. It is copied to the host without a wait and
read when the filter is next computed: by then it is long there. A batch on which the engine was not
accurate takes no part in training (its filter is zero, and so is its gradient); from the next
step on `auto` uses eigh. With engine=gemm the next step ends the run.
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rdm_fast.config import FilterConfig
from rdm_fast.errors import Unavailable
from rdm_fast.filters.engines.gemm import needs_float64
from rdm_fast.runtime.host_copy import HostCopy
from rdm_kernels.matrix_function import CHOLESKY_FAILED, INACCURATE
from rdm_kernels.safe_eigh import has_fast_float64

REASONS = {CHOLESKY_FAILED: "its Cholesky factorization failed", INACCURATE: "residuals are large"}


def choose(config: FilterConfig, device: torch.device) -> str:
    """The engine that `auto` starts with, or the one asked for by name."""
    if config.engine != "auto":
        return config.engine
    if config.why_not_gemm:
        return "eigh"
    if config.kind == "poly" and config.sigma == 2:
        return "gemm"
    if device.type == "cpu" or (needs_float64(config) and not has_fast_float64(device)):
        return "eigh"
    return "gemm"


class Engine:
    """The engine of one filter on one device, which remembers that matrix products failed.

    Attributes:
        name: of the engine in use, as of `filter.engine`.
        failures: batches on which the gemm engine was not accurate.
    """

    def __init__(self, config: FilterConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self._pending: HostCopy | None = None
        self._recorded: Tensor | None = None  # status word that a CUDA graph writes
        self.restore({})

    @property
    def state(self) -> dict[str, int | str]:
        """What a checkpoint keeps, with the last batch taken into account."""
        return {"name": self.current(), "failures": self.failures}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; an empty one forgets everything."""
        self._pending = None
        self.name = state.get("name", choose(self.config, self.device))
        self.failures = state.get("failures", 0)

    def current(self) -> str:
        """The name of the engine to use now.

        Raises:
            Unavailable: engine=gemm was asked for by name and was not accurate on the last batch.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(pending.read())
        return self.name

    def watch(self, status: Tensor | None) -> None:
        """Have the next `current` look at this status word, [v] int32; None: nothing to look at."""
        if status is None:
            return
        if status.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._recorded = status
        else:
            self._pending = HostCopy(status)

    def watch_replay(self) -> None:
        """`watch` the status word of the filter that was recorded in the graph replayed last."""
        self.watch(self._recorded)

    def _read(self, status: Tensor) -> None:
        reasons = [text for bit, text in REASONS.items() if bool((status & bit).any())]
        if not reasons:
            return
        why = f"filter.engine=gemm was not accurate on a batch ({' and '.join(reasons)})"
        if self.config.engine == "gemm":
            raise Unavailable(f"{why}: use filter.engine=auto, which goes on with eigh, or eigh")
        self.failures += 1
        self.name = "eigh"
        warnings.warn(f"{why}, which took no part; from here on it is eigh", stacklevel=2)


@cache
def engine_for(config: FilterConfig, device: torch.device) -> Engine:
    """The engine of this filter in this process: all users of equal filters share what it learned.

    `engine_for.cache_clear()` forgets it.
    """
    return Engine(config, device)
