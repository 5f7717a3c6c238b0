"""Backbones of timm, for the images and patches of a run.

timm draws weights from torch's global generator, so equal seeds give equal weights. Dropout and
stochastic depth are off: a step may run its branches twice (accumulation), and no checkpoint holds
their random numbers. A model that draws any while it trains is refused.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rdm_fast.config import ModelConfig
from rdm_fast.config.checks import did_you_mean
from rdm_fast.errors import Unavailable, UsageError, is_out_of_memory, message_of
from rdm_fast.models.batchnorm import frozen_running_statistics

UNKNOWN = re.compile(r"unexpected keyword argument(.*)")
"""In what Python and timm say of arguments that a model does not take, before their names."""


def build_timm(model: ModelConfig, channels: int, sizes: Sequence[int]) -> tuple[nn.Module, int]:
    """A randomly initialized model of timm, from views to pooled embeddings.

    Args:
        model: names it, and its patches.
        channels: of the images.
        sizes: sides of the views, in pixels. Positional embeddings are for the first, and
            interpolated for the others.

    Returns:
        As `rdm_fast.models.backbone.build_backbone`.

    Raises:
        Unavailable: timm is not installed.
        UsageError: timm has no such model, or it takes no such patches or images.
    """
    module = create_timm(model, channels, sizes)
    for part in module.modules():
        if isinstance(part, nn.Dropout):  # some models have one whatever their arguments
            part.p = 0.0
    if model.frozen_patch:
        _freeze_patches(module, model)
    with torch.no_grad(), frozen_running_statistics(module):
        widths = [_probe(module, model, channels, size) for size in dict.fromkeys(sizes)]
    if len(set(widths)) > 1:
        raise UsageError(
            f"model.backbone={model.backbone} has embeddings of another width for each size of "
            "view: leave out augment.small_views"
        )
    return module, widths[0]


def create_timm(model: ModelConfig, channels: int, sizes: Sequence[int]) -> nn.Module:
    """The model as timm makes it; arguments and errors as of `build_timm`."""
    timm = import_timm()
    if not timm.is_model(model.timm_name):
        fix = did_you_mean(model.timm_name, timm.list_models(), "timm.list_models() has all names")
        raise UsageError(
            f"model.backbone={model.backbone}: timm {timm.__version__} has no such model: {fix}"
        )
    return _create(model, _arguments(model, channels, sizes))[0]


def describe_timm(
    model: ModelConfig, channels: int, size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How others build the model.

    Args:
        model, channels: as for `build_timm`.
        size: of the images.

    Returns:
        Arguments of timm.create_model besides the name and `num_classes`; and the names of the
        first convolution and the classifier, as in timm's `pretrained_cfg`.
    """
    with torch.device("meta"):
        module, arguments = _create(model, _arguments(model, channels, [size]))
    cfg: Any = module.pretrained_cfg
    shown = ("in_chans", "img_size", "patch_size")
    return (
        {key: arguments[key] for key in shown if key in arguments},
        {key: cfg.get(key) for key in ("first_conv", "classifier")},
    )


def import_timm() -> Any:
    """The package timm.

    Raises:
        Unavailable: it cannot be imported.
    """
    try:
        import timm
    except ImportError as error:
        raise Unavailable(
            f"--model.backbone timm/NAME needs timm, which cannot be imported "
            f"({message_of(error)}): pip install 'rdm-fast[timm]', or use a ResNet"
        ) from error
    return timm


def _arguments(model: ModelConfig, channels: int, sizes: Sequence[int]) -> dict[str, Any]:
    """The arguments of timm.create_model besides the name, for a model that takes them all."""
    arguments: dict[str, Any] = {"num_classes": 0, "in_chans": channels, "img_size": sizes[0]}
    if model.patch_size:
        arguments["patch_size"] = model.patch_size
    if len(set(sizes)) > 1:
        arguments["dynamic_img_size"] = True
    return arguments | {"drop_rate": 0.0, "drop_path_rate": 0.0}


def _create(model: ModelConfig, arguments: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and those of the arguments that it takes."""
    generator = torch.get_rng_state()
    try:
        return import_timm().create_model(model.timm_name, **arguments), arguments
    except Exception as error:
        found = UNKNOWN.search(str(error))
        unknown = {key for key in arguments if found and f"'{key}'" in found[1]}
        if "patch_size" in unknown:
            raise UsageError(
                f"model.patch_size={model.patch_size}: {model.backbone} has no patches: leave it "
                "out"
            ) from error
        if not unknown:
            raise _unsuited(model, arguments["img_size"], error) from error
    torch.set_rng_state(generator)
    return _create(model, {key: arguments[key] for key in arguments.keys() - unknown})


def _freeze_patches(module: nn.Module, model: ModelConfig) -> None:
    """Draw the patch projection as MoCo v3 does, and keep it (arXiv:2104.02057, section 4.2)."""
    projection = getattr(getattr(module, "patch_embed", None), "proj", None)
    if not isinstance(projection, nn.Conv2d):
        raise UsageError(
            f"model.frozen_patch: {model.backbone} has no patch projection: leave it out, or use "
            "a ViT"
        )
    nn.init.xavier_uniform_(projection.weight.data.flatten(1))
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)


def _probe(module: nn.Module, model: ModelConfig, channels: int, size: int) -> int:
    """The width of embeddings, from one pass on empty views of this size."""
    generator = torch.get_rng_state()
    try:
        embeddings = module.train()(torch.zeros(2, channels, size, size))
    except Exception as error:
        raise _unsuited(model, size, error) from error
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 2:
        raise UsageError(
            f"model.backbone={model.backbone} gives no pooled embedding of an image: use another"
        )
    if not torch.equal(torch.get_rng_state(), generator):
        raise UsageError(
            f"model.backbone={model.backbone} draws random numbers in every step, which no "
            "checkpoint holds: use another"
        )
    return embeddings.shape[1]


def _unsuited(model: ModelConfig, size: int, error: Exception) -> Exception:
    """What to raise where timm cannot build a model for these images, or it cannot embed them."""
    if is_out_of_memory(error):
        return error
    patches = f" and model.patch_size={model.patch_size}" if model.patch_size else ""
    return UsageError(
        f"model.backbone={model.backbone} cannot take views of {size} pixels{patches} "
        f"({message_of(error)}): change augment.size or model.patch_size, or use another"
    )
