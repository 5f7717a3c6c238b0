"""A step as one CUDA graph: recorded once, then replayed by a single launch.

A replay reads and writes the recording's memory: inputs are copied there, and the next replay
overwrites the outputs. The function must not wait for the device. Its work on the host happens
only while it is recorded.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Out = TypeVar("Out")
WARM_UP = 3  # calls before recording: libraries allocate, optimizers create their state


class StepGraph(Generic[Out]):
    """`run`, replayed as a graph from its fourth call on, with the same bits.

    Args:
        run: takes tensors of fixed shapes, dtypes and memory formats; returns tensors in any
            structure.
    """

    def __init__(self, run: Callable[..., Out]) -> None:
        self._run = run
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: Out
        self.calls = 0

    @property
    def is_recorded(self) -> bool:
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> Out:
        """The outputs of `run`, valid until the next call.

        Raises:
            ValueError: the inputs' shapes or dtypes differ from the recorded ones.
        """
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._run_on_capture_stream(lambda: self._run(*inputs))
        if self._graph is None:
            self._record(inputs)
        if [(x.shape, x.dtype) for x in inputs] != [(x.shape, x.dtype) for x in self._inputs]:
            raise ValueError(
                f"a recorded step takes {[(*x.shape,) for x in self._inputs]}, got "
                f"{[(*x.shape,) for x in inputs]}"
            )
        torch._foreach_copy_(list(self._inputs), list(inputs), non_blocking=True)
        assert self._graph is not None
        self._graph.replay()
        return self._outputs

    def _run_on_capture_stream(self, call: Callable[[], Out]) -> Out:
        """Run on the recording's stream, in order with the current stream."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = call()
        current.wait_stream(self._stream)
        return outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(torch.empty_like(x).copy_(x) for x in inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._outputs = self._run(*self._inputs)
        self._graph = graph
