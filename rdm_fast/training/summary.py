"""The first lines of a run: what `auto` stands for, and what RDM predicts for the filter."""

import torch

from rdm_fast.config import Config
from rdm_fast.data import ImageSet
from rdm_fast.filters.response import advice, few_rows


def summary(
    config: Config,
    images: ImageSet,
    loader: str,
    engine: str,
    *,
    ranks: int,
    device: torch.device,
    graph: bool,
    step: int,
) -> list[str]:
    """The lines; `step` is that of the checkpoint the run continues from, or 0."""
    optim, filtered = config.optim, engine != "none"
    lines = [
        f"{config.method}, predictor {config.predictor}, on {len(images)} images of "
        f"{config.data.name}: {ranks} rank(s) on {device.type}, global batch "
        f"{optim.global_batch}, {optim.local_batch(ranks)} a rank"
        + (f" in {optim.accumulate} parts" if optim.accumulate > 1 else "")
        + f", loader {loader}"
        + (f", filter engine {engine}" if filtered else "")
        + (", steps as a CUDA graph" if graph else "")
    ]
    if filtered:
        found = advice(config.filter), few_rows(optim.global_batch, config.model.projector_dim)
        lines += [f"warning: {text}" for text in found if text]
    if config.method == "dino" and (text := config.prototypes.warning):
        lines.append(f"warning: {text}")
    return lines + [f"resumed from step {step}"] * bool(step)
