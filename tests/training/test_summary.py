"""rdm_fast.training.summary: when the first lines of a run warn."""

from dataclasses import replace

import pytest
from torch import nn

from rdm_fast.config import Config, DataConfig
from rdm_fast.config.recipes import RECIPES
from rdm_fast.data import load
from rdm_fast.tools.sweep.grid import configure
from rdm_fast.training.summary import summary
from tests.runs import new_step
from tests.tiny import tiny


def warnings(config: Config, ranks: int = 1, *, norms: bool = True) -> list[str]:
    step = new_step(tiny())
    if not norms:
        step.method = nn.Identity()  # type: ignore[assignment]
    engine = "eigh" if config.predictor == "spectral" else "none"
    lines = summary(config, load(DataConfig(), "train"), "x", engine, step, ranks=ranks, step=0)
    return [line for line in lines if line.startswith("warning: ")]


def changed(name: str, **optim: object) -> Config:
    config = RECIPES[name]()
    return replace(config, optim=replace(config.optim, **optim))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_no_warning(name: str) -> None:
    assert not warnings(RECIPES[name]())


@pytest.mark.parametrize(("batch", "warned"), [(255, True), (256, False)])
def test_a_batch_that_shows_under_an_eighth_of_the_directions(batch: int, warned: bool) -> None:
    config = changed("cifar10_rdm_simsiam", global_batch=batch)
    config = replace(config, model=replace(config.model, projector_dim=2048))
    found = warnings(config)
    assert len(found) == warned and all(f"{batch} " in line for line in found)
    assert not warnings(replace(config, predictor="mlp"))


def test_a_filter_that_sees_more_images_than_batch_norm() -> None:
    config = changed("cifar10_rdm_simsiam", global_batch=512, accumulate=4)
    (line,) = warnings(config, ranks=2)
    assert "--optim.accumulate 4" in line and " 128 images" in line and " 512," in line
    (line,) = warnings(replace(config, sync_bn=False), ranks=2)
    assert " 64 images" in line
    assert not warnings(config, norms=False)
    assert not warnings(replace(config, predictor="mlp"))
    assert not warnings(changed("cifar10_rdm_simsiam", accumulate=1))


@pytest.mark.parametrize(("temperature", "warned"), [(0.1, True), (0.09, False)])
def test_targets_of_dino_that_are_not_sharper(temperature: float, warned: bool) -> None:
    config = RECIPES["digits_dino"]()
    config = replace(config, prototypes=replace(config.prototypes, teacher_temp=temperature))
    found = warnings(config)
    assert len(found) == warned and all("teacher_temp" in line for line in found)


def test_a_filter_of_dino_needs_no_sharper_targets() -> None:
    config = configure(RECIPES["digits_dino"](), "target_s-1")
    assert config.prototypes.warning and not warnings(config)
