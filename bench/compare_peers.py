"""The same training step by what users could take instead, in turns in one process.

    python -m bench.compare_peers [--case CASE ...] [--rounds N] [--json FILE]

    simsiam, byol                 ours, with their learned predictors
    rdm_simsiam, rdm_byol         ours, with the recipe's spectral filter
    rdm_simsiam_unfiltered        ours, without filter and predictor: what the filter is added to
    rdm_simsiam reference         the reference formulation inside our step: SVD (filter.engine=
                                  reference), NCHW; in the precision of the released scripts, fp16
                                  autocast for CIFAR and fp32 for ImageNet, on a CPU fp32
    lightly simsiam, byol         heads, loss and momentum update of the package lightly in a plain
                                  loop, as its documentation has it: fp32, NCHW
    ... bf16                      the same under bf16 autocast (ours on a GPU is always)

All have the same backbone and widths of heads, the same two views of noise, and SGD with momentum
and weight decay; nothing is augmented. Before anything is timed, in fp32 on the CPU: lightly's
SimSiam with our weights gives our loss, and the reference formulation our filter's gradient.

`pip install 'rdm-fast[peers]'` brings lightly; without it, it is left out, with a sentence.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.exact import views
from bench.machine import describe
from bench.report import peers_table
from bench.training import (
    CASES,
    DEVICE,
    GPU,
    LAUNCHES_MATTER,
    ON_CPU,
    ON_GPU,
    PRECISION,
    UNFILTERED,
    Call,
    Case,
    Turn,
    in_turns,
    noise,
    our_step,
    ratio,
    spread,
    train_step,
)
from rdm_fast import spectral_loss
from rdm_fast.config import Config, Precision
from rdm_fast.config.step import Switch
from rdm_fast.methods import Method, build_method
from rdm_fast.models.backbone import build_backbone
from rdm_fast.runtime.precision import autocast

REFERENCE = "rdm_simsiam reference"
NO_LIGHTLY = (
    "lightly is not installed, so its rows are left out: pip install 'rdm-fast[peers]', or "
    "pip install 'lightly>=1.5'"
)
LOSS_ERROR = 1e-4  # of a mean of cosines in float32, layers in another memory layout
GATE_ROWS = 16
GATE_SHAPE = (64, 256)  # of projections
NOISE_DIRECTIONS = 4  # of B, which the reference keeps; a projector's batch norm makes one, or more
RATIOS = {  # what it says: (slower, faster)
    "filter: step with / without it": ("rdm_simsiam", f"rdm_simsiam{UNFILTERED}"),
    "filter: RDM / plain SimSiam": ("rdm_simsiam", "simsiam"),
    "reference formulation / ours": (REFERENCE, "rdm_simsiam"),
    "lightly / ours, SimSiam": ("lightly simsiam", "simsiam"),
    "lightly / ours with filter": ("lightly simsiam", "rdm_simsiam"),
    "lightly / ours with filter, bf16": ("lightly simsiam", "rdm_simsiam bf16"),
    "lightly bf16 / ours bf16, SimSiam": ("lightly simsiam bf16", "simsiam bf16"),
    "lightly bf16 / ours, SimSiam": ("lightly simsiam bf16", "simsiam"),
    "lightly / ours, BYOL": ("lightly byol", "byol"),
    "lightly / ours with filter, BYOL": ("lightly byol", "rdm_byol"),
}


# ---- lightly, as its documentation has it ----------------------------------------------------


def lightly_version() -> str | None:
    try:
        importlib.import_module("lightly.models.modules")
        return metadata.version("lightly")
    except ImportError:
        return None


class LightlySimSiam(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead

        model = config.model
        self.backbone, width = build_backbone(model, config.augment.channels)
        D = model.projector_dim
        self.projection_head = SimSiamProjectionHead(width, model.projector_hidden, D)
        self.prediction_head = SimSiamPredictionHead(D, model.predictor_hidden, D)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projection_head(self.backbone(x).flatten(start_dim=1))
        p = self.prediction_head(z)
        return z.detach(), p

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        z0, p0 = self(x0)
        z1, p1 = self(x1)
        loss: Tensor = 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))
        return loss

    def update(self) -> None:
        """There are no target weights."""


class LightlyByol(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        from copy import deepcopy

        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        model = config.model
        self.backbone, width = build_backbone(model, config.augment.channels)
        D = model.projector_dim
        self.projection_head = BYOLProjectionHead(width, model.projector_hidden, D)
        self.prediction_head = BYOLPredictionHead(D, model.predictor_hidden, D)
        self.backbone_momentum = deepcopy(self.backbone)
        self.projection_head_momentum = deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: Tensor) -> Tensor:
        p: Tensor = self.prediction_head(self.projection_head(self.backbone(x).flatten(1)))
        return p

    def forward_momentum(self, x: Tensor) -> Tensor:
        z: Tensor = self.projection_head_momentum(self.backbone_momentum(x).flatten(1))
        return z.detach()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        p0, p1 = self(x0), self(x1)
        z0, z1 = self.forward_momentum(x0), self.forward_momentum(x1)
        loss: Tensor = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
        return loss

    def update(self) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.backbone_momentum, m=0.996)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.996)


def lightly_step(case: Case, method: str, precision: Precision) -> Call:
    torch.manual_seed(0)
    config = case.config(method, precision)
    model = (LightlySimSiam if method == "simsiam" else LightlyByol)(config).to(DEVICE)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, momentum=0.9, weight_decay=1e-5
    )
    batch = noise(config, layout=torch.contiguous_format)
    scaled = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")

    def step() -> None:
        model.update()
        with autocast(precision, DEVICE):
            loss = model.loss(batch.view1, batch.view2)
        scaled.scale(loss).backward()
        scaled.step(optimizer)
        scaled.update()
        optimizer.zero_grad()

    return step


# ---- ours ------------------------------------------------------------------------------------


def fair(config: Config, case: Case) -> Config:
    """With SGD, as the rivals' loops have it, for BYOL's recipes have LARS; and without a CUDA
    graph where that is no gain, since graphs of all rivals would not fit into memory at once."""
    graph: Switch = "auto" if case.side <= LAUNCHES_MATTER else "off"
    return replace(
        config,
        optim=replace(config.optim, optimizer="sgd"),
        step=replace(config.step, graph=graph),
    )


def reference_config(case: Case) -> Config:
    precision: Precision = "fp16" if GPU and case.recipes == "cifar10" else "fp32"
    config = case.config("rdm_simsiam", precision)
    return replace(config, filter=replace(config.filter, engine="reference"))


def reference_step(case: Case) -> Call:
    config = reference_config(case)
    step = train_step(config)
    step.method.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    batch = noise(config, layout=torch.contiguous_format)
    return lambda: step(batch, 0)


def rivals_of(case: Case, *, lightly: bool) -> dict[str, Callable[[], Call]]:
    """What makes each rival's step, by name; ours first."""
    methods = ["simsiam", "rdm_simsiam", f"rdm_simsiam{UNFILTERED}", "byol", "rdm_byol"]
    precisions: dict[str, Precision] = {"": PRECISION} if GPU else {"": "fp32", " bf16": "bf16"}
    rivals: dict[str, Callable[[], Call]] = {}
    for suffix, precision in precisions.items():
        for method in methods:
            config = fair(case.config(method, precision), case)
            filtered = not method.endswith(UNFILTERED)
            rivals[method + suffix] = partial(our_step, config, filtered=filtered)
    rivals[REFERENCE] = partial(reference_step, case)
    for method in ("simsiam", "byol") if lightly else ():
        rivals[f"lightly {method}"] = partial(lightly_step, case, method, "fp32")
        rivals[f"lightly {method} bf16"] = partial(lightly_step, case, method, "bf16")
    return rivals


# ---- right first -----------------------------------------------------------------------------


def check(case: Case, *, lightly: bool) -> None:
    """That rivals compute the same, in float32 on the CPU, where nothing is rounded to tf32.

    The filter's gradient is compared on projections as a projector leaves them.

    Raises:
        AssertionError: they do not.
    """
    cpu, (B, D) = torch.device("cpu"), GATE_SHAPE
    gradients = []
    for config in (case.config("rdm_simsiam", "fp32"), reference_config(case)):
        z = views(B, D, cpu, torch.float32)
        found = torch.autograd.grad(spectral_loss(*z, config.filter), z)
        gradients.append(torch.stack(found).flatten())
    agreement = float(F.cosine_similarity(*gradients, dim=0))
    assert agreement >= 1 - NOISE_DIRECTIONS / B, (
        f"the reference formulation's gradient is not ours: cosine {agreement:.3f}"
    )
    if not lightly:
        return
    config = case.config("simsiam", "fp32")
    pixels = torch.randn(2, GATE_ROWS, config.augment.channels, case.side, case.side)
    torch.manual_seed(0)
    plain, model = build_method(config), LightlySimSiam(config)
    give_weights(plain, model)
    error = abs(float(plain(*pixels).loss.detach()) - float(model.loss(*pixels).detach()))
    assert error <= LOSS_ERROR, f"lightly's SimSiam has another loss than ours, by {error:.1e}"


def give_weights(ours: Method, model: LightlySimSiam) -> None:
    """Our weights to lightly's modules, layer by layer; a bias before a batch norm is without
    effect, and lightly has none there."""
    model.backbone.load_state_dict(ours.backbone.state_dict())
    parts = [(ours.projector, model.projection_head), (ours.predictor, model.prediction_head)]
    for one, other in parts:
        assert isinstance(one, nn.Module)
        for source, target in zip(layers(one), layers(other), strict=True):
            assert type(source) is type(target)
            known = target.state_dict()
            target.load_state_dict({k: v for k, v in source.state_dict().items() if k in known})


def layers(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.BatchNorm1d)]


# ---- the race --------------------------------------------------------------------------------


def race(case: Case, rounds: int, *, lightly: bool) -> dict[str, Any]:
    """One case's result as JSON values."""
    check(case, lightly=lightly)
    torch.backends.cudnn.deterministic = True  # as in training
    rivals: dict[str, Call] = {}
    skipped = []
    for name, make in rivals_of(case, lightly=lightly).items():
        try:
            step = make()
            step()
            rivals[name] = step
        except torch.OutOfMemoryError:
            skipped.append(f"{name}: out of GPU memory")
            torch.cuda.empty_cache()
    turns = in_turns(rivals, rounds)
    rows = {}
    for name, times in turns.items():
        median, iqr = spread([turn.wall for turn in times])
        rows[name] = {"median_s": median, "iqr_s": iqr, "images_per_s": case.batch / median}
        if not GPU:
            cpu_s, cpu_iqr_s = spread([turn.cpu for turn in times])
            rows[name] |= {"cpu_median_s": cpu_s, "cpu_iqr_s": cpu_iqr_s}
    return {
        "case": case.name,
        "n": rounds,
        "steps": rows,
        "ratios": ratios_of(turns),
        "skipped": skipped,
        "load_average": os.getloadavg()[0],
    }


def ratios_of(turns: dict[str, list[Turn]]) -> dict[str, dict[str, float]]:
    """Each of RATIOS whose two rivals ran, by the clock and, on a CPU, by CPU time."""
    found = {}
    for title, (one, other) in RATIOS.items():
        if one in turns and other in turns:
            both = turns[one], turns[other]
            found[title] = {"wall": ratio(*([turn.wall for turn in times] for times in both))}
            if not GPU:
                found[title]["cpu"] = ratio(*([turn.cpu for turn in times] for times in both))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.compare_peers", description=(__doc__ or "").split("\n")[0]
    )
    cases = [case.name for case in (ON_GPU if GPU else ON_CPU)]
    parser.add_argument("--case", nargs="+", choices=CASES, default=cases, metavar="CASE",
                        help=f"of {', '.join(CASES)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=9, help="turns of each rival")
    parser.add_argument("--json", type=Path, help="write results, device and versions to this file")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: give 1 or more")
    lightly = lightly_version()
    if lightly is None:
        print(NO_LIGHTLY, file=sys.stderr)
    results = []
    for name in args.case:
        results.append(race(CASES[name], args.rounds, lightly=lightly is not None))
        print(peers_table(results[-1:]), end="\n\n", flush=True)
        if args.json:  # after each case, so that what is done is kept
            report = {"machine": describe(), "lightly": lightly, "results": results}
            args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
