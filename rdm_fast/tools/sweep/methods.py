"""Every method on one data set, side by side: `rdm sweep digits_methods`, or of any other family.

    simsiam  byol  swav  dino     the recipes
    symsimsiam                    the paper's control: centered, no stop-gradient, no asymmetry
    control                       SimSiam without its predictor
    dino_without_centring         DINO's targets are a softmax, not centered
    dino_without_sharpening       they are as soft as the online branch's output
    swav_without_sinkhorn         SwAV's targets are a sharpened softmax

The last three are ablations of what keeps the prototypes in equal use.
"""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from rdm_fast.config import Config
from rdm_fast.config.checks import did_you_mean, require
from rdm_fast.config.recipes import RECIPES
from rdm_fast.tools.report import read
from rdm_fast.tools.sweep.grid import CONTROL, configure

TITLES = {
    **{name: read.METHODS[name] for name in ("simsiam", "byol", "swav", "dino", "symsimsiam")},
    CONTROL: "no predictor",
    "dino_without_centring": "DINO, not centered",
    "dino_without_sharpening": "DINO, not sharpened",
    "swav_without_sinkhorn": "SwAV, plain softmax",
}
METHODS = tuple(TITLES)
SUFFIX = "_methods"
SWEEPS = {
    family + SUFFIX: RECIPES[f"{family}_simsiam"]
    for family in (name.removesuffix("_dino") for name in RECIPES if name.endswith("_dino"))
}
"""Every such sweep, and the recipe whose flags it takes."""


def require_method(name: str) -> None:
    """Check the name of a method.

    Raises:
        UsageError: there is no such method.
    """
    fix = did_you_mean(name, METHODS, f"use some of {', '.join(METHODS)}")
    require(name in METHODS, f"--methods {name} is not a method: {fix}")


def configure_method(sweep: str, given: Config, name: str) -> Config:
    """The recipe of a method, with what the flags changed, in a run folder of its name.

    Args:
        sweep: the sweep's name, such as digits_methods.
        given: SimSiam's recipe with the flags.
        name: a name that `require_method` accepts.

    Raises:
        UsageError: the flags contradict the recipe.
    """
    family = sweep.removesuffix(SUFFIX)
    method, _, ablation = name.partition("_without_")
    config = RECIPES[f"{family}_{'simsiam' if name == CONTROL else method}"]()
    how = config.prototypes
    match ablation:
        case "centring" | "sinkhorn":
            how = replace(how, centring="none", queue=0, queue_epoch=0.0)
        case "sharpening":
            flat = how.temperature
            how = replace(how, teacher_temp_start=flat, teacher_temp=flat, teacher_temp_epochs=0.0)
    config = _with_changes(given, SWEEPS[sweep](), replace(config, prototypes=how))
    if name == CONTROL:
        return configure(replace(config, out=given.out), CONTROL)
    return replace(config, out=f"{given.out}/{name}")


def _with_changes(given: Any, base: Any, onto: Any) -> Any:
    """`onto` with the fields in which `given` differs from `base`."""
    if not is_dataclass(base):
        return onto if given == base else given
    names = [field.name for field in fields(base)]
    changes = {
        name: _with_changes(*(getattr(each, name) for each in (given, base, onto)))
        for name in names
        if getattr(given, name) != getattr(base, name)
    }
    return replace(onto, **changes)
