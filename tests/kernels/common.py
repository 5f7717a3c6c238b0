"""Shared by the tests of the kernels: the device, small tiles, and recorded launches."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.runtime.jit import KernelInterface

from rdm_kernels.tiles import Blocks
from rdm_kernels.variant import OPTIONS


def choose_device() -> torch.device:
    """A GPU where there is one; else the CPU, with Triton's interpreter (tests/conftest.py)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


DEVICE = choose_device()
INTERPRETED = bool(triton.knobs.runtime.interpret)
U = 2.0**-24  # unit roundoff of float32
SMALL = Blocks(16, 16, 4, 2)  # several tiles even for matrices that are quick to interpret

Body = Callable[..., Any]


def bodies(op: Body, launcher: Body) -> pytest.MarkDecorator:
    """Parametrize `body`: the definition, the kernels, and the kernels with a sum in parts."""
    kernel = partial(launcher, block=SMALL, parts=1)
    split = partial(launcher, block=SMALL, parts=3)
    names = ["definition", "kernel", "split"]
    return pytest.mark.parametrize("body", [op, kernel, split], ids=names)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=drawn).to(DEVICE, dtype)


def rotated(eigenvalues: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Q diag(eigenvalues) Q^T and the random rotation Q, float64."""
    n = len(eigenvalues)
    Q = torch.linalg.qr(randn(n, n, seed=seed, dtype=torch.float64))[0]
    return Q * eigenvalues.to(Q) @ Q.mT, Q


def roundoff(X: Tensor) -> float:
    return torch.finfo(X.dtype).eps / 2


class Launches(list[tuple[Any, dict[str, Any]]]):
    """Kernels and their arguments by name, recorded instead of launched; see `record`."""

    device: torch.device | None = None  # that `torch.cuda.device_of` made current

    def record(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def launch(kernel: Any, *args: Any, **options: Any) -> None:
            bound = inspect.signature(kernel.fn).bind(
                *args, **{name: value for name, value in options.items() if name not in OPTIONS}
            )
            options = {name: options[name] for name in OPTIONS if name in options}
            self.append((kernel, bound.arguments | options | {"device": self.device}))

        class Guard:
            def __init__(_, X: Tensor) -> None:
                _.device = X.device

            def __enter__(_) -> None:
                self.device = _.device

            def __exit__(_, *error: object) -> None:
                self.device = None

        monkeypatch.setattr(torch.cuda, "device_of", Guard)
        monkeypatch.setattr(
            KernelInterface, "__getitem__", lambda kernel, grid: partial(launch, kernel)
        )
