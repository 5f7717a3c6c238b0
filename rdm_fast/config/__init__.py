"""All settings of a run, one frozen dataclass per concern.

A recipe (`rdm_fast.config.recipes`) is a function that returns a whole `Config`. The command line
names a recipe and changes single fields: `rdm train digits_rdm_simsiam --optim.epochs 20`. The
string under a field is its help text, and `Alias` gives its flag a short name. Derived
values are properties. Nothing here imports torch, so a command line is checked before torch loads.

A bad value raises `UsageError`, a `ValueError` that names the flag, the value and the fix.
"""

from rdm_fast.config.data import AugmentConfig, DataConfig, DataName, Interpolation, ViewConfig
from rdm_fast.config.filter import FilterConfig, Kind
from rdm_fast.config.guard import GuardConfig
from rdm_fast.config.log import LogConfig
from rdm_fast.config.model import RESNETS, TIMM, ModelConfig, Stem
from rdm_fast.config.optim import OptimConfig
from rdm_fast.config.parallel import ParallelConfig
from rdm_fast.config.prototypes import PrototypesConfig
from rdm_fast.config.run import Config, Precision
from rdm_fast.config.step import StepConfig

__all__ = [
    "RESNETS",
    "TIMM",
    "AugmentConfig",
    "Config",
    "DataConfig",
    "DataName",
    "FilterConfig",
    "GuardConfig",
    "Interpolation",
    "Kind",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "Precision",
    "PrototypesConfig",
    "Stem",
    "StepConfig",
    "ViewConfig",
]
