"""A step as one CUDA graph: recorded once, then replayed by a single launch.

A replay reads and writes the memory of the recording. So inputs are copied to fixed places, and
outputs are tensors that the next replay overwrites. The function must not wait for the device,
and what it does on the host happens while recording only.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Out = TypeVar("Out")
WARM_UP = 3  # calls that run as they are: libraries allocate, optimizers create their state


class StepGraph(Generic[Out]):
    """`run`, from its fourth call on as a graph. Results are those of `run`, bit for bit.

    Args:
        run: from tensors of fixed shapes, dtypes and memory formats to tensors, in any structure.
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
        """The outputs of `run`; those of a replay are valid until the next one.

        Raises:
            ValueError: inputs differ in shape or dtype from those of the recording.
        """
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._beside(lambda: self._run(*inputs))
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

    def _beside(self, call: Callable[[], Out]) -> Out:
        """Run on the stream of the recording, between what the current stream did and will do."""
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
