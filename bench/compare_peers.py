"""Training steps of rdm-fast and of its alternatives, timed in turns in one process.

    python -m bench.compare_peers [--case CASE ...] [--rounds N] [--rows FILE]

    simsiam, byol                 rdm-fast, with their learned predictors
    dino, swav                    rdm-fast, with two views; only on a CPU
    rdm_simsiam, rdm_byol         rdm-fast, with the recipe's spectral filter
    rdm_simsiam_unfiltered        rdm-fast, without filter and predictor
    ... fastest                   the same with cuDNN's fastest algorithms; only on a GPU
    rdm_simsiam reference         the reference formulation in rdm-fast's step: SVD (filter.engine=
                                  reference), NCHW, in the precision of the released scripts: fp16
                                  autocast for CIFAR, fp32 for ImageNet and on a CPU
    lightly simsiam, byol, dino, swav
                                  heads, loss and momentum update of the package lightly in a plain
                                  loop, as in its documentation: fp32, NCHW
    ... bf16                      the same under bf16 autocast (on a GPU rdm-fast always uses it)

All share the backbone, the widths of the heads, two views of noise, and SGD with momentum and
weight decay; nothing is augmented. The reference formulation and lightly have cuDNN's
fastest algorithms. Before the timing, in fp32 on the CPU: lightly's SimSiam with rdm-fast's weights
must have its loss, and the reference formulation its filter's gradient.

`pip install 'rdm-fast[peers]'` installs lightly; without it, its rows are left out with a warning.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.exact import views
from bench.lightly_steps import LightlySimSiam, lightly_step, lightly_version
from bench.machine import describe
from bench.report import peers_table
from bench.rows import SMALL, append
from bench.training import (
    CASES,
    CUDNN,
    FASTEST,
    GPU,
    LAUNCHES_MATTER,
    ON_CPU,
    ON_GPU,
    PRECISION,
    SMALLEST,
    UNFILTERED,
    Call,
    Case,
    Turn,
    in_turns,
    our_step,
    ratio,
    spread,
    with_cudnn,
)
from rdm_fast import spectral_loss
from rdm_fast.config import Config, Precision
from rdm_fast.config.step import Switch
from rdm_fast.methods import Method, build_method

REFERENCE = "rdm_simsiam reference"
SUFFIX = f" {FASTEST}"
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
    "DINO / SimSiam": ("dino", "simsiam"),
    "SwAV / SimSiam": ("swav", "simsiam"),
    "lightly / rdm-fast, DINO": ("lightly dino", "dino"),
    "lightly / rdm-fast, SwAV": ("lightly swav", "swav"),
}


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
    config = replace(config, filter=replace(config.filter, engine="reference"))
    return with_cudnn(config, FASTEST)


def rivals_of(case: Case, *, lightly: bool) -> dict[str, Callable[[], Call]]:
    """Functions that build each rival's step, by name."""
    prototypes = [] if GPU else ["dino", "swav"]
    methods = [
        "simsiam",
        "rdm_simsiam",
        f"rdm_simsiam{UNFILTERED}",
        "byol",
        "rdm_byol",
        *prototypes,
    ]
    precisions: dict[str, Precision] = {"": PRECISION} if GPU else {"": "fp32", " bf16": "bf16"}
    rivals: dict[str, Callable[[], Call]] = {}
    for (suffix, precision), cudnn in product(precisions.items(), CUDNN):
        for method in methods:
            config = with_cudnn(fair(case.config(method, precision), case), cudnn)
            name = method + suffix + (SUFFIX if cudnn == FASTEST else "")
            filtered = not method.endswith(UNFILTERED)
            rivals[name] = partial(our_step, config, filtered=filtered)
    nchw = torch.contiguous_format
    rivals[REFERENCE] = partial(our_step, reference_config(case), layout=nchw, dtype=torch.float32)
    for method in ("simsiam", "byol", *prototypes) if lightly else ():
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
        "cudnn": ", ".join(CUDNN),
        "n": rounds,
        "steps": rows,
        "ratios": ratios_of(turns),
        "skipped": skipped,
        "load_average": os.getloadavg()[0],
    }


def ratios_of(turns: dict[str, list[Turn]]) -> dict[str, dict[str, float]]:
    """Each of RATIOS whose two rivals ran, by the clock and, on a CPU, by CPU time.

    On a GPU once more with cuDNN's fastest algorithms in rdm-fast's steps.
    """
    found: dict[str, dict[str, float]] = {}
    clocks = ("wall",) if GPU else ("wall", "cpu")
    for (title, pair), suffix in product(RATIOS.items(), ("", SUFFIX)):
        names = tuple(name + suffix if name + suffix in turns else name for name in pair)
        if {*names} <= {*turns} and (not suffix or names != pair):
            found[title + suffix] = {
                clock: ratio(*([getattr(turn, clock) for turn in turns[name]] for name in names))
                for clock in clocks
            }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.compare_peers", description=(__doc__ or "").split("\n")[0]
    )
    cases = [case.name for case in (ON_GPU if GPU else ON_CPU)]
    parser.add_argument("--case", nargs="+", choices=CASES, default=cases, metavar="CASE",
                        help=f"of {', '.join(CASES)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=9, help="turns of each rival")
    parser.add_argument("--rows", type=Path, help="file to append each case to, as JSON")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: give 1 or more")
    lightly = lightly_version()
    if lightly is None:
        print(NO_LIGHTLY, file=sys.stderr)
    for name in [SMALLEST.name] if SMALL else args.case:
        rounds = 1 if SMALL else args.rounds
        result = race(CASES[name], rounds, lightly=lightly is not None)
        print(peers_table([result]), end="\n\n", flush=True)
        append(args.rows, {"machine": describe(), "lightly": lightly} | result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
