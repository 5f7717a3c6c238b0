"""The methods, and how a configuration becomes one."""

from torch import nn

from rdm_fast.config import Config
from rdm_fast.filters.loss import Criterion, NegativeCosine, SpectralCosine
from rdm_fast.methods.base import Branches, Method, StepOutput
from rdm_fast.methods.byol import Byol
from rdm_fast.methods.simsiam import SimSiam
from rdm_fast.methods.symsimsiam import SymSimSiam
from rdm_fast.models.backbone import build_backbone
from rdm_fast.models.heads import mlp_predictor, projector

__all__ = ["Branches", "Byol", "Method", "SimSiam", "StepOutput", "SymSimSiam", "build_method"]


def build_method(config: Config) -> Method:
    """Backbone, heads and method of a run, on the CPU, drawn from torch's global generator."""
    model, is_byol = config.model, config.method == "byol"
    backbone, d_embedding = build_backbone(model, config.augment.channels, config.augment.sizes)
    head = projector(model, d_embedding)
    if config.method == "symsimsiam":
        return SymSimSiam(backbone, head)
    predictor: nn.Module = nn.Identity()
    criterion: Criterion = SpectralCosine(config.filter)
    if config.predictor == "mlp":
        predictor = mlp_predictor(model.projector_dim, model.predictor_hidden, bias=is_byol)
        criterion = NegativeCosine()
    return (Byol if is_byol else SimSiam)(backbone, head, predictor, criterion)
