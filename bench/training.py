"""Whole training steps on noise, rdm-fast's and the supervised roof, and timing them in turns.

A case is `RECIPES resnetN SIDEpx bBATCH`. Every step repeats one batch of noise at the schedule's
first, small learning rate, since time does not depend on the content of images.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench.conftest import ROUND_S, plan, synced_clock, warmed
from rdm_fast.config import Config, ModelConfig, Precision
from rdm_fast.config.recipes import recipe
from rdm_fast.data import Batch
from rdm_fast.methods import build_method
from rdm_fast.models.backbone import build_backbone
from rdm_fast.runtime.cudnn import choose_algorithms
from rdm_fast.runtime.precision import autocast, dtype_of_views
from rdm_fast.tools.doctor.stages import without_filter
from rdm_fast.training.cuda_graph import WARM_UP
from rdm_fast.training.train_step import TrainStep

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PRECISION: Precision = "bf16" if GPU else "fp32"
LAYOUT = torch.channels_last
CLASSES = {"digits": 10, "cifar10": 10, "imagenet": 1000}
UNFILTERED = "_unfiltered"
FASTEST = "fastest"
CUDNN = ("deterministic", FASTEST) if GPU else ("unused",)
"""Algorithms of convolutions with which rdm-fast's steps are timed; a CPU has no cuDNN."""
STEPS_PER_EPOCH = 100
LAUNCHES_MATTER = 64  # pixels a side; a CUDA graph of larger images reserves tens of GiB
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Data and model that all rivals share."""

    recipes: str
    """digits, cifar10 or imagenet, for heads, optimizer and stem."""
    backbone: str
    side: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.recipes} {self.backbone} {self.side}px b{self.batch}"

    def config(self, method: str, precision: Precision = PRECISION) -> Config:
        """Of a method as recipes name it: simsiam, rdm_simsiam, byol, rdm_byol, symsimsiam, dino or
        swav; the suffix UNFILTERED changes nothing."""
        config = recipe(f"{self.recipes}_{method.removesuffix(UNFILTERED)}")
        model = config.model
        if self.backbone == "resnet8":  # the digits' model, with heads in proportion
            small = ModelConfig(backbone="resnet8", width=24, predictor_hidden=64)
            model = replace(
                small,
                projector_layers=model.projector_layers,
                projector_bn=model.projector_bn,
                projector_hidden=256,
                projector_dim=256,
            )
        return replace(
            config,
            model=model,
            augment=replace(config.augment, size=self.side),
            optim=replace(config.optim, global_batch=self.batch),
            precision=precision,
        )


SMALLEST = Case("cifar10", "resnet8", 8, 8)
ON_CPU = [
    Case("digits", "resnet8", 16, 200),  # the embedded default
    Case("cifar10", "resnet8", 32, 64),
    Case("cifar10", "resnet18", 32, 16),
]
ON_GPU = [
    *(Case("cifar10", "resnet18", 32, batch) for batch in (512, 256)),
    *(Case("imagenet", "resnet50", 224, batch) for batch in (128, 256, 512)),
]
CASES = {case.name: case for case in [SMALLEST, *ON_CPU, *ON_GPU]}


def noise(
    config: Config, dtype: torch.dtype = torch.float32, layout: torch.memory_format = LAYOUT
) -> Batch:
    """Two independent views, on the device."""
    rows, side = config.optim.global_batch, config.augment.size
    views = torch.randn(2, rows, config.augment.channels, side, side).to(DEVICE, dtype)
    view1, view2 = (view.contiguous(memory_format=layout) for view in views)
    labels = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    return Batch(view1, view2, labels, torch.from_numpy(np.arange(rows)))


def train_step(config: Config, *, filtered: bool = True) -> TrainStep:
    """rdm-fast's step."""
    choose_algorithms(deterministic=config.step.deterministic)  # as the trainer does
    torch.manual_seed(0)
    method = build_method(config) if filtered else without_filter(config)
    return TrainStep(method, config, DEVICE, STEPS_PER_EPOCH)


def our_step(
    config: Config,
    *,
    filtered: bool = True,
    layout: torch.memory_format = LAYOUT,
    dtype: torch.dtype | None = None,
) -> Call:
    """rdm-fast's step with its batch; if steps are CUDA graphs, already recorded.

    Args:
        config: the run.
        filtered: with its spectral filter, if it has one.
        layout: of weights and views.
        dtype: of the views, unless it is that of the precision.
    """
    step = train_step(config, filtered=filtered)
    step.method.to(memory_format=layout)  # type: ignore[call-overload]
    batch = noise(config, dtype or dtype_of_views(config.precision, DEVICE), layout)
    for _ in range(WARM_UP + 1 if step.graph else 0):
        step(batch, 0)

    def once() -> None:
        choose_algorithms(deterministic=config.step.deterministic)  # rivals choose others
        step(batch, 0)

    return once


def with_cudnn(config: Config, algorithms: str) -> Config:
    """The configuration with algorithms of CUDNN."""
    return replace(config, step=replace(config.step, deterministic=algorithms != FASTEST))


def supervised_step(case: Case, precision: Precision = PRECISION) -> Call:
    """The roof: the same backbone with a linear classifier, one view of each image, SGD, and
    cuDNN's fastest algorithms."""
    config = case.config("simsiam", precision)
    torch.manual_seed(0)
    backbone, d_embedding = build_backbone(
        config.model, config.augment.channels, config.augment.sizes
    )
    model = nn.Sequential(backbone, nn.Linear(d_embedding, CLASSES[case.recipes]))
    model.to(DEVICE, memory_format=LAYOUT)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-5, fused=GPU, foreach=not GPU
    )
    batch = noise(config, dtype_of_views(precision, DEVICE))

    def step() -> None:
        choose_algorithms(deterministic=False)
        with autocast(precision, DEVICE):
            loss = F.cross_entropy(model(batch.view1), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---- time --------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """Seconds per call in one round."""

    wall: float
    cpu: float
    """Of all threads of this process; other programs disturb it less."""


def in_turns(rivals: Mapping[str, Call], rounds: int) -> dict[str, list[Turn]]:
    """The time of each rival's call in every round.

    In each round every rival has one turn, and the order rotates, so that other load on the
    machine hits all of them alike. Take ratios within rounds (`ratio`).
    """
    calls = {name: plan(warmed(call), ROUND_S)[1] for name, call in rivals.items()}
    names = list(rivals)
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for k in range(rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            turns[name].append(turn(rivals[name], calls[name]))
    return turns


def turn(call: Call, n: int) -> Turn:
    """The time of one of n calls in a row."""
    wall, cpu = synced_clock(), time.process_time()
    for _ in range(n):
        call()
    return Turn((synced_clock() - wall) / n, (time.process_time() - cpu) / n)


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Median over rounds of one's time over the other's in the same round."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Median and inter-quartile range."""
    if len(values) < 2:
        return float(values[0]), 0.0
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, high - low


def phases(step: TrainStep, batch: Batch, rounds: int) -> dict[str, float]:
    """Median milliseconds of the parts of an eager step, each synchronized.

    forward     both branches
    loss        the criterion with its filter, forward and backward
    backward    from projections to weights
    update      gradient norm, optimizer and target weights
    """
    times: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for name, seconds in _phases_once(step, batch).items():
            times.setdefault(name, []).append(1e3 * seconds)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _phases_once(step: TrainStep, batch: Batch) -> dict[str, float]:
    method = step.method
    marks = [synced_clock()]

    def mark() -> None:
        marks.append(synced_clock())

    with autocast(step.config.precision, DEVICE):
        branches = method.branches(*batch.views)
        mark()
        online = branches.online.detach().requires_grad_()
        gradient = torch.autograd.grad(method.loss(online, branches.target), online)
    mark()
    branches.online.backward(gradient)
    mark()
    torch.nn.utils.get_total_norm([p.grad for p in method.parameters() if p.grad is not None])
    step.optimizer.step()
    method.update_target(0.99, branches)
    mark()
    step.optimizer.zero_grad(set_to_none=True)
    names = ("forward", "loss", "backward", "update")
    return {name: b - a for name, (a, b) in zip(names, pairwise(marks), strict=True)}


def peak_memory_gib(call: Call) -> float | None:
    """Peak GPU memory of tensors during a call; None on a CPU."""
    if not GPU:
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30
