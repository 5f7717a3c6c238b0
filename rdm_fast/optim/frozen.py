"""Parameters that an optimizer step leaves alone while a flag on the device is set."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@contextmanager
def undone_where(
    frozen: tuple[Sequence[nn.Parameter], Tensor], optimizer: Optimizer
) -> Iterator[None]:
    """Put parameters and their optimizer state back after the block where the flag is set.

    So no gradient, decay, momentum or trust ratio reaches them, as if they had no gradient, and
    nothing waits for the device. State that the block adds starts from zeros.

    Args:
        frozen: parameters of the optimizer, and a boolean scalar on the device.
        optimizer: its state is a tensor for each name and parameter.
    """
    parameters, flag = frozen
    values = [p.detach().clone() for p in parameters]
    states = [{k: x.clone() for k, x in _state(optimizer, p).items()} for p in parameters]
    yield
    with torch.no_grad():
        for p, value, state in zip(parameters, values, states, strict=True):
            p.copy_(torch.where(flag, value, p))
            for key, x in _state(optimizer, p).items():
                x.copy_(torch.where(flag, state.get(key, 0), x))


def _state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    state = optimizer.state.get(parameter, {})
    return {key: x for key, x in state.items() if isinstance(x, Tensor)}
