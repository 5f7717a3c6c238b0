"""rdm_fast.evaluation.train_on_views: each epoch other views, the same on any number of ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rdm_fast.config import Config, ViewConfig
from rdm_fast.data import ImageSet
from rdm_fast.data.images.datasets import load_digits
from rdm_fast.data.images.sets import PixelImages, Subset
from rdm_fast.data.views.augment import view_of_image
from rdm_fast.data.views.sampler import draw_views, epoch_order
from rdm_fast.evaluation.protocols import PROTOCOLS, Protocol
from rdm_fast.evaluation.train_on_views import VIEW, train_on_views, view_batches
from rdm_fast.models.backbone import build_backbone
from rdm_fast.runtime.distributed import rank
from tests.ranks import run_ranks
from tests.tiny import tiny

CPU = torch.device("cpu")
GENTLE = ViewConfig(crop_scale=(0.8, 1.0))
SGD = replace(PROTOCOLS["reference-cifar"], epochs=2, batch=64, lr=0.5)


def digits(n: int = 200) -> ImageSet:
    return Subset(load_digits("train"), np.arange(n))


def make_backbone(config: Config) -> nn.Module:
    torch.manual_seed(0)
    backbone, _ = build_backbone(config.model, 1)
    return backbone.eval()


def train(finetune: bool, protocol: Protocol = SGD, n: int = 200, seed: int = 0) -> dict[str, Any]:
    config = tiny()
    backbone = make_backbone(config)
    classifier = train_on_views(
        backbone, digits(n), config, protocol, classes=10, seed=seed, device=CPU,
        finetune=finetune, view=GENTLE,
    )  # fmt: skip
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    return {
        "weight": classifier.weight,
        "bias": classifier.bias,
        "backbone": torch.cat([t.float().flatten() for t in backbone.state_dict().values()]),
    }


def test_every_epoch_shows_each_image_once_in_other_crops() -> None:
    config, images = tiny(), digits(64)
    shown = [list(view_batches(images, config, VIEW, 3, epoch, 32, CPU)) for epoch in (0, 1, 0)]
    assert images.labels is not None
    for epoch, batches in zip((0, 1, 0), shown, strict=True):
        labels = torch.cat([labels for _, labels in batches])
        assert labels.tolist() == images.labels[epoch_order(3, epoch, 64)].tolist()
    first, second, again = (torch.cat([views for views, _ in batches]) for batches in shown)
    assert first.shape == (64, 1, 16, 16) and torch.equal(first, again)
    back = np.argsort(epoch_order(3, 0, 64)), np.argsort(epoch_order(3, 1, 64))
    assert (first[back[0]] - second[back[1]]).abs().flatten(1).amax(1).min() > 0.1


def test_images_that_are_decoded_one_by_one_give_torchvisions_views() -> None:
    class OneByOne(Subset):
        pixels = None

    images, config = digits(16), replace(tiny(), data=replace(tiny().data, workers=0))
    (found, _), *_ = view_batches(OneByOne(images, np.arange(16)), config, VIEW, 1, 2, 16, CPU)
    order = epoch_order(1, 2, 16)
    drawn = draw_views(VIEW, 1, 2, order, 0, *images.sizes[order].T)
    mean, std = config.augment.mean[0], config.augment.std[0]
    for row, i in enumerate(order.tolist()):
        levels = view_of_image(images.read(i), drawn, row, config.augment)
        expected = (torch.from_numpy(levels.copy()).permute(2, 0, 1) / 255 - mean) / std
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)
    assert isinstance(load_digits("test"), PixelImages)


def test_a_frozen_backbone_stays_as_it_is_bit_for_bit() -> None:
    config = tiny()
    fresh = torch.cat([t.float().flatten() for t in make_backbone(config).state_dict().values()])
    first, again, other = train(False), train(False), train(False, seed=1)
    assert torch.equal(first["backbone"], fresh)
    assert torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["weight"], other["weight"])


def accuracy(found: dict[str, Any], finetuned: bool, n: int = 200) -> float:
    config = tiny()
    backbone = make_backbone(config)
    if finetuned:
        flat, start = found["backbone"], 0
        for tensor in backbone.state_dict().values():
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()
    blank = ViewConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    ((views, labels),) = view_batches(digits(n), config, blank, 0, 0, n, CPU)
    with torch.no_grad():
        logits = backbone(views) @ found["weight"].T + found["bias"]
    return float((logits.argmax(1) == labels).float().mean())


def test_fine_tuning_learns_what_a_probe_of_random_weights_cannot() -> None:
    longer = replace(SGD, epochs=20)
    probe, tuned = train(False, longer), train(True, longer)
    assert not torch.equal(probe["backbone"], tuned["backbone"])
    assert accuracy(tuned, True) > accuracy(probe, False) + 0.1 > 0.3


@pytest.mark.parametrize("solver", ["sgd", "lars"])
def test_the_protocols_solver_trains(solver: str) -> None:
    protocol = replace(SGD, solver=solver, epochs=1)  # type: ignore[arg-type]
    other = replace(protocol, solver="lars" if solver == "sgd" else "sgd")
    assert not torch.equal(train(False, protocol)["weight"], train(False, other)["weight"])


SHORT = replace(SGD, epochs=1, lr=0.02)  # long training amplifies rounding


def _on_a_rank() -> list[dict[str, Tensor]]:
    assert rank() in (0, 1)
    return [train(finetune, SHORT) for finetune in (False, True)]


def test_two_ranks_train_what_one_does(tmp_path: Path) -> None:
    alone = [train(finetune, SHORT) for finetune in (False, True)]
    one, two = run_ranks(2, _on_a_rank, tmp_path=tmp_path)
    for finetune in (False, True):
        for name, expected in alone[finetune].items():
            assert torch.equal(one[finetune][name], two[finetune][name])
            # three steps, whose sums over a batch associate differently
            torch.testing.assert_close(one[finetune][name], expected, atol=1e-4, rtol=0)
    # and that is no empty bound: without the other rank's half it is far from there
    half = train(False, replace(SHORT, batch=32))
    assert (half["weight"] - alone[0]["weight"]).abs().max() > 1e-3
