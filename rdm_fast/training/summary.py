"""The first lines of a run: what `auto` stands for, and what RDM predicts for the filter."""

from torch.nn.modules.batchnorm import _BatchNorm

from rdm_fast.config import Config
from rdm_fast.data import ImageSet
from rdm_fast.filters.response import advice, few_rows, normalized_apart
from rdm_fast.training.train_step import TrainStep


def summary(
    config: Config,
    images: ImageSet,
    loader: str,
    engine: str,
    train_step: TrainStep,
    *,
    ranks: int,
    step: int,
) -> list[str]:
    """The lines; `step` is that of the checkpoint the run continues from, or 0."""
    optim, filtered, batch = config.optim, engine != "none", config.optim.global_batch
    lines = [
        f"{config.method}, predictor {config.predictor}, on {len(images)} images of "
        f"{config.data.name}: {ranks} rank(s) on {train_step.device.type}, global batch "
        f"{batch}, {optim.local_batch(ranks)} a rank"
        + (f" in {optim.accumulate} parts" if optim.accumulate > 1 else "")
        + f", loader {loader}"
        + (f", filter engine {engine}" if filtered else "")
        + (", steps as a CUDA graph" if train_step.graph else "")
    ]
    if filtered:
        found = [advice(config.filter), few_rows(batch, config.model.projector_dim)]
        if any(isinstance(module, _BatchNorm) for module in train_step.method.modules()):
            rows = batch // optim.accumulate // (1 if config.sync_bn else ranks)
            found.append(normalized_apart(batch, optim.accumulate, rows))
        lines += [f"warning: {text}" for text in found if text]
    if (
        config.method == "dino"
        and config.predictor == "none"
        and (text := config.prototypes.warning)
    ):
        lines.append(f"warning: {text}")
    return lines + [f"resumed from step {step}"] * bool(step)
