"""rdm_fast.evaluation.train_on_views: new views in each epoch, the same on any number of ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from rdm_fast.config import Config, ViewConfig
from rdm_fast.data import ImageSet
from rdm_fast.data.images.datasets import load_digits
from rdm_fast.data.images.sets import PixelImages, Subset
from rdm_fast.data.views.augment import view_of_image
from rdm_fast.data.views.sampler import draw_views, epoch_order
from rdm_fast.evaluation import train_on_views as module
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
    """The trained classifier and backbone, as tensors, and their accuracy on the same images."""
    config = tiny()
    backbone = make_backbone(config)
    classifier = train_on_views(
        backbone, digits(n), config, protocol, classes=10, seed=seed, device=CPU,
        finetune=finetune, view=GENTLE,
    )  # fmt: skip
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    whole = ViewConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    part = digits(128)
    ((views, labels),) = view_batches(part, config, whole, 0, 0, len(part), CPU)
    with torch.no_grad():
        hits = classifier.logits(backbone(views)).argmax(1) == labels
    return {
        "weight": classifier.weight,
        "bias": classifier.bias,
        "backbone": flat(backbone),
        "accuracy": float(hits.float().mean()),
    }


def flat(backbone: nn.Module) -> Tensor:
    return torch.cat([t.float().flatten() for t in backbone.state_dict().values()])


def test_every_epoch_shows_each_image_once_in_other_crops() -> None:
    config, images = tiny(size=16), digits(64)
    shown = [list(view_batches(images, config, VIEW, 3, epoch, 32, CPU)) for epoch in (0, 1, 0)]
    assert images.labels is not None
    for epoch, batches in zip((0, 1, 0), shown, strict=True):
        labels = torch.cat([labels for _, labels in batches])
        assert labels.tolist() == images.labels[epoch_order(3, epoch, 64)].tolist()
    first, second, again = (torch.cat([views for views, _ in batches]) for batches in shown)
    assert first.shape == (64, 1, 16, 16) and torch.equal(first, again)
    back = np.argsort(epoch_order(3, 0, 64)), np.argsort(epoch_order(3, 1, 64))
    assert (first[back[0]] - second[back[1]]).abs().flatten(1).amax(1).min() > 0.1


def test_images_decoded_one_by_one_give_torchvisions_views() -> None:
    class OneByOne(Subset):
        pixels = None

    images, config = digits(16), replace(tiny(size=16), data=replace(tiny().data, workers=0))
    (found, _), *_ = view_batches(OneByOne(images, np.arange(16)), config, VIEW, 1, 2, 16, CPU)
    order = epoch_order(1, 2, 16)
    drawn = draw_views(VIEW, 1, 2, order, 0, *images.sizes[order].T)
    mean, std = config.augment.mean[0], config.augment.std[0]
    for row, i in enumerate(order.tolist()):
        levels = view_of_image(images.read(i), drawn, row, config.augment)
        expected = (torch.from_numpy(levels.copy()).permute(2, 0, 1) / 255 - mean) / std
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)
    assert isinstance(load_digits("test"), PixelImages)


def test_a_frozen_backbone_does_not_change_and_the_seed_decides_the_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[int] = []

    def spy(*args: Any, **options: Any) -> Any:
        batches.append(args[5])
        return view_batches(*args, **options)

    monkeypatch.setattr(module, "view_batches", spy)
    first, again, other = train(False), train(False), train(False, seed=1)
    assert batches == [SGD.batch] * SGD.epochs * 3
    assert torch.equal(first["backbone"], flat(make_backbone(tiny())))
    assert torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["weight"], other["weight"])
    lars = train(False, replace(SGD, solver="lars"))
    assert not torch.equal(first["weight"], lars["weight"])


def test_fine_tuning_learns_what_a_probe_of_random_weights_cannot() -> None:
    longer = replace(SGD, epochs=16)
    probe, tuned = train(False, longer), train(True, longer)
    assert not torch.equal(probe["backbone"], tuned["backbone"])
    assert tuned["accuracy"] > 0.7 > probe["accuracy"] + 0.2


SHORT = replace(SGD, epochs=1, lr=0.02)  # longer training amplifies rounding


def test_layer_decay_lowers_the_rate_of_the_layers_below_the_classifier() -> None:
    backbone = make_backbone(tiny())
    before = [p.clone() for p in backbone.parameters()]
    still = replace(SHORT, layer_decay=1e-30)
    train_on_views(
        backbone, digits(64), tiny(), still, classes=10, seed=0, device=CPU, finetune=True
    )
    for p, q in zip(before, backbone.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-20, rtol=0)


WITH_REST = replace(SHORT, drop_last=False)


def _on_a_rank() -> list[dict[str, Tensor]]:
    assert rank() in (0, 1)
    return _every_kind()


def _every_kind() -> list[dict[str, Tensor]]:
    """Frozen, fine-tuned, and frozen with a last batch of 8."""
    return [train(False, SHORT), train(True, SHORT), train(False, WITH_REST)]


def test_two_ranks_train_the_same_as_one(tmp_path: Path) -> None:
    alone = _every_kind()
    one, two = run_ranks(2, _on_a_rank, tmp_path=tmp_path)
    for ours, theirs, single in zip(one, two, alone, strict=True):
        for name in ("weight", "bias", "backbone"):
            assert torch.equal(ours[name], theirs[name])
            # three or four steps, whose sums over a batch associate differently
            torch.testing.assert_close(ours[name], single[name], atol=1e-4, rtol=0)
    # The bound is not empty: without the other rank's half the result is far off.
    half = train(False, replace(SHORT, batch=32))
    assert (half["weight"] - alone[0]["weight"]).abs().max() > 1e-3
    assert (alone[2]["weight"] - alone[0]["weight"]).abs().max() > 1e-3  # its fourth step


def test_a_last_batch_is_filled_up_to_equal_shares_like_torchs_distributed_sampler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, order = digits(10), epoch_order(5, 1, 10)
    shown: list[list[Tensor]] = []
    monkeypatch.setattr(module, "world_size", lambda: 3)
    for place in range(3):
        monkeypatch.setattr(module, "rank", lambda place=place: place)
        part = view_batches(images, tiny(), VIEW, 5, 1, 6, CPU, drop_last=False)
        shown.append([labels for _, labels in part])
        sampler = DistributedSampler(range(10), 3, place, drop_last=False)  # type: ignore[arg-type, var-annotated]
        assert sum(map(len, shown[-1])) == len(sampler) == 4
    assert images.labels is not None
    batches = [torch.cat(parts).tolist() for parts in zip(*shown, strict=True)]
    found = [images.labels[rows].tolist() for rows in (order[:6], [*order[6:], *order[:2]])]
    assert batches == found
