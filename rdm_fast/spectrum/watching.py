"""Forward hooks that record the spectra of any model while it trains.

with watch(model, every=100) as spectra:
    train(model)
print(spectra.records[-1].effective_rank)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from rdm_fast.runtime.distributed import gather_rows
from rdm_fast.runtime.printing import warn
from rdm_fast.spectrum.directions import directions, measured_response
from rdm_fast.spectrum.measures import attainable_rank, channel_std, effective_rank, eigenvalues

PROTOTYPES = ("prototypes", "last_layer", "target_prototypes")
"""Names of the modules that give logits in SwAV's and DINO's code, lightly and this project."""
HEADS = ("projector", "projection_head", "predictor", "prediction_head")
"""Names of the modules to watch in solo-learn, lightly, SimSiam's code and this project."""


@dataclass(frozen=True)
class WatchedBatch:
    """Measures of the output of one forward pass of one module."""

    name: str  # of the module inside the model; "" for the model itself
    call: int  # forward passes of this module in training mode, from 1
    eigenvalues: Tensor  # of the correlation matrix, [n] float64, largest first, on the CPU
    effective_rank: float
    share: float  # of the largest effective rank that the batch can show
    std: float  # of the normalized rows, times sqrt(d): 1 is spread out, 0 is collapse
    s: Tensor | None = None  # [n], of the module's input, if it has the shape of the output
    response: Tensor | None = None  # [n], how much the module scales these directions


@dataclass
class Watch:
    """Hooks on modules and the records they make; a context manager that removes the hooks."""

    records: list[WatchedBatch] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    def remove(self) -> None:
        """Remove the hooks; the records stay."""
        while self.handles:
            self.handles.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def watch(
    model: nn.Module,
    *names: str,
    every: int = 100,
    on_record: Callable[[WatchedBatch], object] | None = None,
    all_ranks: bool = False,
    temperature: float | None = None,
) -> Watch:
    """Record the spectrum of module outputs, every so many forward passes while training.

    A module that keeps the width of its input, as a predictor does, is also measured as a filter
    (`measured_response`). Outputs and gradients are untouched. Each record waits for the device.

    Args:
        model: any module.
        names: modules inside it, as in `model.named_modules()`, with outputs [B, d]. By default
            those named projector, projection_head, predictor or prediction_head; the model itself
            if there are none.
        every: forward passes in training mode between two records, counted per module; the first
            one is recorded. A SimSiam has two in a step.
        on_record: called with each record, for example to log it.
        all_ranks: measure the rows of all ranks; every rank must then watch, with the same `every`.
        temperature: measure softmax(output / temperature), the output of DINO and SwAV. A warning
            says so if a module named prototypes or last_layer is watched without: ranks of logits
            can differ the other way round.

    Returns:
        A handle with `records` and `remove()`, which is also a context manager.

    Raises:
        ValueError: a name is not a module of the model, `every` is less than 1, or `temperature`
            is not positive. The forward pass raises it if an output is not [B, d].
    """
    if every < 1:
        raise ValueError(f"watch(every={every}): use 1 or more")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"watch(temperature={temperature}): use a positive one, such as 0.1")
    modules = dict(model.named_modules())
    if unknown := [name for name in names if name not in modules]:
        raise ValueError(f"{type(model).__name__} has no module {unknown[0]} to watch")
    found = names or [name for name in modules if name.rpartition(".")[2] in HEADS]
    logits = [name for name in found if name.rpartition(".")[2] in PROTOTYPES]
    if logits and temperature is None:
        warn(
            f"watch measures the logits of {logits[0]}, before the softmax, where rank "
            "differences can have the other sign: give the softmax's temperature, as in "
            "watch(model, 'prototypes', temperature=0.1)",
            stacklevel=2,
        )
    handle = Watch()
    for name in found or [""]:
        hook = _Hook(name, every, handle.records, on_record, all_ranks, temperature)
        handle.handles.append(modules[name].register_forward_hook(hook))
    return handle


@dataclass
class _Hook:
    name: str
    every: int
    records: list[WatchedBatch]
    on_record: Callable[[WatchedBatch], object] | None
    all_ranks: bool
    temperature: float | None
    calls: int = 0

    @torch.no_grad()
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not module.training:
            return
        self.calls += 1
        if (self.calls - 1) % self.every:
            return
        if not isinstance(output, Tensor) or output.ndim != 2:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"watch needs outputs [B, d], and {self.name or 'the model'} returned {shape}: "
                "name its projector or predictor, as in watch(model, 'projector')"
            )
        with torch.autocast(output.device.type, enabled=False):
            if self.temperature is not None:
                wide = output.to(torch.promote_types(output.dtype, torch.float32))
                record = self._measure(None, (wide / self.temperature).softmax(dim=1))
            else:
                record = self._measure(inputs[0] if inputs else None, output)
        self.records.append(record)
        if self.on_record is not None:
            self.on_record(record)

    def _measure(self, taken: Any, output: Tensor) -> WatchedBatch:
        rows = self._rows(output)
        values = eigenvalues(rows)
        rank = effective_rank(values)
        s = response = None
        if isinstance(taken, Tensor) and taken.shape == output.shape:
            z = self._rows(taken)
            axes = directions(z)
            s, response = axes.s.cpu(), measured_response(z, rows, axes).cpu()
        return WatchedBatch(
            name=self.name,
            call=self.calls,
            eigenvalues=values.flip(0).cpu(),
            effective_rank=float(rank),
            share=float(rank / attainable_rank(rows)),
            std=float(channel_std(rows)),
            s=s,
            response=response,
        )

    def _rows(self, z: Tensor) -> Tensor:
        return gather_rows(z[None])[0] if self.all_ranks else z.detach()
