"""Recipes: functions that return a whole `Config`.

Hyper-parameters are those of the paper's released code (PKU-ML/Rank-Differential-Mechanism, with
solo-learn's CIFAR and ImageNet-100 recipes and SimSiam's ImageNet recipe). It has no BYOL on
ImageNet, whose optimizer is BYOL's own. docs/reproducing.md lists the deliberate differences. A
recipe with a learned predictor and its RDM twin differ in the predictor only.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from rdm_fast.config import Config
from rdm_fast.config.recipes import cifar, digits, imagenet, prototypes, vit

DEFAULT = digits.digits_rdm_simsiam.__name__

FAMILIES = (digits, cifar, imagenet, vit, prototypes)
NAME = re.compile("(digits|cifar|imagenet)[0-9]*_")

RECIPES: dict[str, Callable[[], Config]] = {
    name: function
    for family in FAMILIES
    for name, function in vars(family).items()
    if NAME.match(name)
}


def recipe(name: str) -> Config:
    """The configuration of a recipe, with run folder runs/<name>."""
    return replace(RECIPES[name](), out=f"runs/{name}")
