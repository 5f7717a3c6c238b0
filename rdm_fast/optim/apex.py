"""NVIDIA apex's fused optimizers (optim.backend=apex), where a real apex is installed.

apex is built from source. The package named apex on PyPI is another project whose import fails with
unhelpful errors, so the installed package is inspected before it is imported.
"""

import importlib
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rdm_fast.config import OptimConfig
from rdm_fast.errors import Unavailable, message_of

CLASSES = {"sgd": "FusedSGD", "adamw": "FusedAdam", "lamb": "FusedLAMB"}
WAY_OUT = (
    "build it from github.com/NVIDIA/apex with its CUDA extensions, or use optim.backend=torch, "
    "whose sgd and adamw are fused too"
)


def build_apex_optimizer(
    groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device
) -> Optimizer:
    """An optimizer of apex over the groups of `parameter_groups`.

    Args:
        groups: parameter groups.
        optim: sgd, adamw or lamb (apex's LAMB also scales gradients to a global norm of 1).
        device: where the parameters are.

    Raises:
        Unavailable: the device is not a GPU, or apex is missing, another project, or built
            without its CUDA extensions.
    """
    if device.type != "cuda":
        raise Unavailable(
            f"optim.backend=apex runs on GPUs only, and this run is on {device.type}: "
            "use optim.backend=torch"
        )
    kind = _with_own_state(_fused(CLASSES[optim.optimizer]))
    settings: dict[str, Any] = {"lr": optim.lr}
    if optim.optimizer == "sgd":
        settings["momentum"] = optim.momentum
    try:
        return kind(groups, **settings)
    except RuntimeError as error:  # apex was built for Python only
        raise Unavailable(f"optim.backend=apex: {message_of(error)}: {WAY_OUT}") from error


def _fused(name: str) -> type[Optimizer]:
    """The class of this name in apex.optimizers."""
    spec = find_spec("apex")
    if spec is None:
        raise Unavailable(f"optim.backend=apex: NVIDIA apex is not installed: {WAY_OUT}")
    folders = spec.submodule_search_locations
    if PathFinder.find_spec("apex.optimizers", folders) is None:
        raise Unavailable(
            "optim.backend=apex needs NVIDIA apex, and the installed apex is another project (PyPI "
            f"has one of that name): pip uninstall apex, then {WAY_OUT}"
        )
    try:
        optimizers = importlib.import_module("apex.optimizers")
        found: type[Optimizer] = getattr(optimizers, name)
    except (ImportError, OSError, AttributeError) as error:
        raise Unavailable(
            f"optim.backend=apex: the installed NVIDIA apex has no usable {name} "
            f"({message_of(error)}), perhaps because it was built for another torch: {WAY_OUT}"
        ) from error
    return found


def _with_own_state(base: type[Optimizer]) -> type[Optimizer]:
    """The class with its count of steps in the state of its parameters, as in torch.

    apex keeps the count in the parameter group, which our checkpoints do not hold.
    """

    class Counted(base):  # type: ignore[misc, valid-type]
        def zero_grad(self, set_to_none: bool = True) -> None:
            Optimizer.zero_grad(self, set_to_none)

        found_inf: Tensor | None = None

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            if self.found_inf is not None and self.found_inf.item():
                return None  # apex cannot skip on the device, so this waits for it
            for group in self.param_groups:
                group.pop("step", None)
                for p in group["params"]:
                    if "step" in self.state.get(p, {}):
                        group["step"] = self.state[p]["step"]
            loss: float | None = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    if "step" in group and p in self.state:
                        self.state[p]["step"] = group["step"]
            return loss

    Counted.__name__ = base.__name__
    return Counted
