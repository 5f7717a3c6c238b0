"""Images a second, and the time spent waiting for data."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class StepTimer:
    """Times the steps, and the waits for data, since the last `read`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start over, which leaves out whatever followed the last step, such as an evaluation."""
        self._start, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def waits(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches, with the time until each arrives counted as waiting."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self._waited += time.perf_counter() - before
            self._steps += 1
            yield batch

    def read(self, global_batch: int) -> dict[str, float]:
        """images_per_s and data_wait_s, then `restart`."""
        steps = max(1, self._steps)
        seconds = time.perf_counter() - self._start
        metrics = {
            "images_per_s": steps * global_batch / seconds,
            "data_wait_s": self._waited / steps,
        }
        self.restart()
        return metrics
