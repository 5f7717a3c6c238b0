"""The methods, and how a configuration becomes one."""

from torch import nn

from rdm_fast.config import Config
from rdm_fast.filters.loss import Criterion, NegativeCosine, SpectralCosine
from rdm_fast.methods.base import Branches, Encoder, Method, StepOutput
from rdm_fast.methods.byol import Byol
from rdm_fast.methods.dino import Dino
from rdm_fast.methods.prototypes import PrototypeMethod, Prototypes
from rdm_fast.methods.simsiam import SimSiam
from rdm_fast.methods.swav import Swav
from rdm_fast.methods.symsimsiam import SymSimSiam
from rdm_fast.models.backbone import build_backbone
from rdm_fast.models.heads import draw_like_dino, mlp_predictor, projector
from rdm_fast.runtime.precision import HALVES

__all__ = [
    "Branches", "Byol", "Dino", "Encoder", "Method", "PrototypeMethod", "SimSiam", "StepOutput",
    "Swav", "SymSimSiam", "build_method",
]  # fmt: skip


def build_method(config: Config) -> Method:
    """Backbone, heads and method of a run, on the CPU, drawn from torch's global generator."""
    model, is_byol = config.model, config.method == "byol"
    backbone, d_embedding = build_backbone(model, config.augment.channels, config.augment.sizes)
    head = projector(model, d_embedding)
    if config.method == "symsimsiam":
        return SymSimSiam(backbone, head)
    if config.method in ("dino", "swav"):
        if config.method == "dino":
            draw_like_dino(head)
        width, narrow = model.projector_dim, HALVES.get(config.precision)
        prototypes = Prototypes(config.prototypes.count, width, narrow)
        kind = Dino if config.method == "dino" else Swav
        spectral = config.filter if config.predictor == "spectral" else None
        return kind(backbone, head, prototypes, config.prototypes, spectral)
    predictor: nn.Module = nn.Identity()
    criterion: Criterion = SpectralCosine(config.filter)
    if config.predictor == "mlp":
        predictor = mlp_predictor(model.projector_dim, model.predictor_hidden, bias=is_byol)
        criterion = NegativeCosine()
    return (Byol if is_byol else SimSiam)(backbone, head, predictor, criterion)
