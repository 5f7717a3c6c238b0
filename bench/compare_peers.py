"""Training steps of rdm-fast and of its alternatives, timed in turns in one process.

    python -m bench.compare_peers [--case CASE ...] [--rounds N] [--json FILE]

    simsiam, byol                 rdm-fast, with their learned predictors
    rdm_simsiam, rdm_byol         rdm-fast, with the recipe's spectral filter
    rdm_simsiam_unfiltered        rdm-fast, without filter and predictor
    rdm_simsiam reference         the reference formulation in rdm-fast's step: SVD (filter.engine=
                                  reference), NCHW, in the precision of the released scripts: fp16
                                  autocast for CIFAR, fp32 for ImageNet and on a CPU
    lightly simsiam, byol         heads, loss and momentum update of the package lightly in a plain
                                  loop, as in its documentation: fp32, NCHW
    ... bf16                      the same under bf16 autocast (on a GPU rdm-fast always uses it)

All share the backbone, the widths of the heads, two views of noise, and SGD with momentum and
weight decay; nothing is augmented. Before the timing, in fp32 on the CPU: lightly's SimSiam with
rdm-fast's weights must have its loss, and the reference formulation its filter's gradient.

`pip install 'rdm-fast[peers]'` installs lightly; without it, its rows are left out with a warning.
"""

import argparse
import copy
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
NOISE_DIRECTIONS = 4  # of B; the reference keeps them, and a projector's batch norm makes some
RATIOS = {  # title: (numerator, denominator)
    "filter: step with / without it": ("rdm_simsiam", f"rdm_simsiam{UNFILTERED}"),
    "filter: RDM / plain SimSiam": ("rdm_simsiam", "simsiam"),
    "reference formulation / rdm-fast": (REFERENCE, "rdm_simsiam"),
    "lightly / rdm-fast, SimSiam": ("lightly simsiam", "simsiam"),
    "lightly / rdm-fast with filter": ("lightly simsiam", "rdm_simsiam"),
    "lightly / rdm-fast with filter, bf16": ("lightly simsiam", "rdm_simsiam bf16"),
    "lightly bf16 / rdm-fast bf16, SimSiam": ("lightly simsiam bf16", "simsiam bf16"),
    "lightly bf16 / rdm-fast, SimSiam": ("lightly simsiam bf16", "simsiam"),
    "lightly / rdm-fast, BYOL": ("lightly byol", "byol"),
    "lightly / rdm-fast with filter, BYOL": ("lightly byol", "rdm_byol"),
}


# ---- lightly -----------------------------------------------------------------------------------


def lightly_version() -> str | None:
    try:
        importlib.import_module("lightly.models.modules")
        return metadata.version("lightly")
    except ImportError:
        return None


class LightlySimSiam(nn.Module):
    """lightly's SimSiam; as in its documentation, but for the backbone."""

    heads = "SimSiamProjectionHead", "SimSiamPredictionHead"

    def __init__(self, config: Config) -> None:
        super().__init__()
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models import modules

        model, (projection, prediction) = config.model, self.heads
        self.backbone, width = build_backbone(model, config.augment.channels)
        hidden, D = model.projector_hidden, model.projector_dim
        self.projection_head = getattr(modules, projection)(width, hidden, D)
        self.prediction_head = getattr(modules, prediction)(D, model.predictor_hidden, D)
        self.criterion = NegativeCosineSimilarity()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        z0, z1 = (self.projection_head(self.backbone(x).flatten(1)) for x in (x0, x1))
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        return self.symmetric(p0, p1, z0.detach(), z1.detach())

    def symmetric(self, p0: Tensor, p1: Tensor, z0: Tensor, z1: Tensor) -> Tensor:
        loss: Tensor = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
        return loss

    def update(self) -> None:
        """Does nothing: there are no target weights."""


class LightlyByol(LightlySimSiam):
    """lightly's BYOL; as in its documentation, but for the backbone."""

    heads = "BYOLProjectionHead", "BYOLPredictionHead"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
        self.projection_momentum = copy.deepcopy(self.projection_head).requires_grad_(False)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        p0, p1 = (
            self.prediction_head(self.projection_head(self.backbone(x).flatten(1)))
            for x in (x0, x1)
        )
        z0, z1 = (
            self.projection_momentum(self.backbone_momentum(x).flatten(1)).detach()
            for x in (x0, x1)
        )
        return self.symmetric(p0, p1, z0, z1)

    def update(self) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.backbone_momentum, m=0.996)
        update_momentum(self.projection_head, self.projection_momentum, m=0.996)


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


# ---- rdm-fast ----------------------------------------------------------------------------------


def fair(config: Config, case: Case) -> Config:
    """With SGD, as in the rivals' loops (BYOL's recipes use LARS), and without a CUDA graph for
    large images, where it gains nothing and graphs of all rivals would not fit into memory."""
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
    """Functions that build each rival's step, by name."""
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


# ---- are they equal? ---------------------------------------------------------------------------


def check(case: Case, *, lightly: bool) -> None:
    """Check that rivals compute the same, in float32 on the CPU, where nothing is tf32.

    The filter's gradient is compared on projections like those of a projector.

    Raises:
        AssertionError: they differ.
    """
    cpu, (B, D) = torch.device("cpu"), GATE_SHAPE
    gradients = []
    for config in (case.config("rdm_simsiam", "fp32"), reference_config(case)):
        z = views(B, D, cpu, torch.float32)
        found = torch.autograd.grad(spectral_loss(*z, config.filter), z)
        gradients.append(torch.stack(found).flatten())
    agreement = float(F.cosine_similarity(*gradients, dim=0))
    assert agreement >= 1 - NOISE_DIRECTIONS / B, (
        f"the reference formulation has another gradient: cosine {agreement:.3f}"
    )
    if not lightly:
        return
    config = case.config("simsiam", "fp32")
    pixels = torch.randn(2, GATE_ROWS, config.augment.channels, case.side, case.side)
    torch.manual_seed(0)
    plain, model = build_method(config), LightlySimSiam(config)
    give_weights(plain, model)
    error = abs(float(plain(*pixels).loss.detach()) - float(model.loss(*pixels).detach()))
    assert error <= LOSS_ERROR, f"lightly's SimSiam has another loss, by {error:.1e}"


def give_weights(ours: Method, model: LightlySimSiam) -> None:
    """Copy rdm-fast's weights to lightly's modules, layer by layer. lightly has no biases before
    batch norms, where they have no effect."""
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


# ---- the race ----------------------------------------------------------------------------------


def race(case: Case, rounds: int, *, lightly: bool) -> dict[str, Any]:
    """The result of a case, as JSON values."""
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
        if args.json:  # after each case, so that finished cases are kept
            report = {"machine": describe(), "lightly": lightly, "results": results}
            args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
