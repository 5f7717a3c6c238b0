"""Training steps of the package lightly, in a plain loop as in its documentation."""

import copy
import importlib
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.training import DEVICE, Call, Case, noise
from rdm_fast.config import Config, Precision
from rdm_fast.models.backbone import build_backbone
from rdm_fast.runtime.cudnn import choose_algorithms
from rdm_fast.runtime.precision import autocast


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
        self.backbone, width = build_backbone(model, config.augment.channels, config.augment.sizes)
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


class LightlyDino(nn.Module):
    """lightly's DINO; as in its documentation, but for the backbone and the number of outputs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead

        model, count = config.model, config.prototypes.count
        self.backbone, width = build_backbone(model, config.augment.channels, config.augment.sizes)
        sizes = (width, model.projector_hidden, model.projector_dim, count)
        self.projection_head = DINOProjectionHead(*sizes)
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
        self.projection_momentum = DINOProjectionHead(*sizes).requires_grad_(False)
        self.criterion = DINOLoss(output_dim=count)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        views = (x0, x1)
        teacher = [self.projection_momentum(self.backbone_momentum(x).flatten(1)) for x in views]
        student = [self.projection_head(self.backbone(x).flatten(1)) for x in views]
        loss: Tensor = self.criterion(teacher, student, epoch=0)
        return loss

    def update(self) -> None:
        LightlyByol.update(self)  # type: ignore[arg-type]


class LightlySwav(nn.Module):
    """lightly's SwAV without small views, likewise."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        from lightly.loss import SwaVLoss
        from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

        model = config.model
        self.backbone, width = build_backbone(model, config.augment.channels, config.augment.sizes)
        sizes = (width, model.projector_hidden, model.projector_dim)
        self.projection_head = SwaVProjectionHead(*sizes)
        self.prototypes = SwaVPrototypes(model.projector_dim, config.prototypes.count)
        self.criterion = SwaVLoss()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        z = (self.projection_head(self.backbone(x).flatten(1)) for x in (x0, x1))
        loss: Tensor = self.criterion([self.prototypes(F.normalize(rows, dim=1)) for rows in z], [])
        return loss

    def update(self) -> None:
        self.prototypes.normalize()


MODELS = {
    "simsiam": LightlySimSiam, "byol": LightlyByol, "dino": LightlyDino, "swav": LightlySwav,
}  # fmt: skip


def lightly_step(case: Case, method: str, precision: Precision) -> Call:
    torch.manual_seed(0)
    config = case.config(method, precision)
    model: Any = MODELS[method](config).to(DEVICE)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, momentum=0.9, weight_decay=1e-5
    )
    batch = noise(config, layout=torch.contiguous_format)
    scaled = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")

    def step() -> None:
        choose_algorithms(deterministic=False)
        model.update()
        with autocast(precision, DEVICE):
            loss = model.loss(batch.view1, batch.view2)
        scaled.scale(loss).backward()
        scaled.step(optimizer)
        scaled.update()
        optimizer.zero_grad()

    return step
