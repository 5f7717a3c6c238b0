"""State by name: of optimizers, and of any parts with a state_dict."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rdm_fast.config.checks import shown
from rdm_fast.errors import DataError
from rdm_fast.run.checkpoint import Snapshot
from rdm_fast.run.schema import is_number

Named = Iterable[tuple[str, nn.Parameter]]


class Stateful(Protocol):
    """An object whose state is tensors and JSON values, in a flat dictionary."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


def flatten_parts(parts: Mapping[str, Stateful]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of named objects: tensors under `<name>/<key>`, other values under their names."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, part in parts.items():
        state = part.state_dict()
        tensors |= {f"{name}/{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        plain[name] = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    return tensors, plain


def restore_parts(parts: Mapping[str, Stateful], snapshot: Snapshot) -> None:
    """Load what `flatten_parts` returned; a part without a saved state keeps its own."""
    for name, part in parts.items():
        prefix = f"{name}/"
        found = {
            k.removeprefix(prefix): v for k, v in snapshot.extra.items() if k.startswith(prefix)
        }
        if state := found | snapshot.state.get(name, {}):
            part.load_state_dict(state)


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: Named
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state, by parameter name.

    Args:
        optimizer: of any class whose state holds tensors and plain values.
        named_parameters: names of all its parameters, as `module.named_parameters()` gives them.

    Returns:
        tensors and plain values (numbers, None), both under `<parameter name>/<state key>`.
        Hyper-parameters are left out: configuration and schedule set them.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            target = tensors if isinstance(value, Tensor) else plain
            target[f"{names[id(parameter)]}/{key}"] = value
    return tensors, plain


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Named,
    tensors: dict[str, Tensor],
    plain: dict[str, Any],
    wanted: Iterable[str] = (),
) -> None:
    """Restore the state that `flatten_optimizer` returned, bit for bit.

    A tensor of its parameter's shape takes the parameter's device and memory layout, as in a
    running optimizer. A step counter is on the host, unless the optimizer is fused or capturable.

    Args:
        optimizer, named_parameters: as of `flatten_optimizer`.
        tensors, plain: what it returned.
        wanted: keys that every parameter must have.

    Raises:
        DataError: the state belongs to other parameters, or is missing, or has numbers that are
            not finite or of another type.
    """
    named = dict(named_parameters)
    on_device = {
        id(parameter): bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    state: dict[Tensor, dict[str, Any]] = {}
    for path, value in (tensors | plain).items():
        name, _, key = path.rpartition("/")
        parameter = named.get(name)
        if parameter is None or id(parameter) not in on_device:
            raise DataError(f"the checkpoint's optimizer state {path} has no parameter here")
        if isinstance(value, Tensor):
            counts = key == "step" and value.ndim == 0
            if not bool(value.isfinite().all()) or not (counts or value.dtype == parameter.dtype):
                raise DataError(
                    f"the checkpoint's optimizer state {path}, in {value.dtype}, is not finite "
                    f"numbers in {parameter.dtype}"
                )
            if counts:
                value = value.to(parameter.device if on_device[id(parameter)] else "cpu", copy=True)
            elif value.shape == parameter.shape:
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            else:
                raise DataError(
                    f"the checkpoint's optimizer state {path} has shape {list(value.shape)}, "
                    f"its parameter here {list(parameter.shape)}"
                )
        elif not (value is None or is_number(value)) or (key in wanted and key != "step"):
            raise DataError(f"the checkpoint's optimizer state {path} cannot be {shown(value)}")
        state.setdefault(parameter, {})[key] = value
    for name, parameter in named.items():
        missing = set(wanted) - set(state.get(parameter, {}))
        if id(parameter) in on_device and missing:
            raise DataError(f"the checkpoint has no optimizer state {name}/{min(missing)}")
    optimizer.state.clear()
    optimizer.state.update(state)
