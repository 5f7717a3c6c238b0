"""rdm_fast.config.saved: configurations through text and back, and what a resume may change."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import yaml

from rdm_fast.config import Config, DataConfig, OptimConfig
from rdm_fast.config.recipes import RECIPES, recipe
from rdm_fast.config.saved import (
    LATER,
    check_allowed,
    check_resumable,
    config_digest,
    config_from_dict,
    config_to_dict,
    flat,
    rule,
)
from rdm_fast.errors import ConfigMismatch, DataError, UsageError

CONFIG = RECIPES["digits_rdm_simsiam"]()


def through_yaml(plain: dict[str, Any]) -> Any:
    return yaml.safe_load(yaml.safe_dump(plain, sort_keys=False))


def through_json(plain: dict[str, Any]) -> Any:
    return json.loads(json.dumps(plain, allow_nan=False))


def names(cls: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings, from the dataclasses themselves."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from names(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


# ---- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize("through", [through_yaml, through_json])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_text_exactly(name: str, through: Any) -> None:
    config = recipe(name)
    plain = config_to_dict(config)
    assert through(plain) == plain
    restored = config_from_dict(through(plain))
    assert restored == config
    assert hash(restored) == hash(config)  # lists became tuples again, or this would raise
    assert config_to_dict(restored) == plain


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-3, 5e-324, 1 / 3])
def test_floats_survive_to_the_last_bit(value: float) -> None:
    config = replace(CONFIG, optim=replace(CONFIG.optim, base_lr=value))
    for through in (through_yaml, through_json):
        assert config_from_dict(through(config_to_dict(config))).optim.base_lr == value


def test_whole_numbers_and_exponents_in_float_settings_are_floats() -> None:
    whole, point = (
        replace(CONFIG, optim=replace(CONFIG.optim, warmup_epochs=epochs)) for epochs in (2, 2.0)
    )
    assert json.dumps(config_to_dict(whole)) == json.dumps(config_to_dict(point))
    plain = yaml.safe_load("filter: {cutoff: 1e-4}")
    assert plain["filter"]["cutoff"] == "1e-4"  # YAML 1.1
    assert config_from_dict(plain).filter.cutoff == 1e-4


def test_missing_settings_get_their_defaults() -> None:
    assert config_from_dict({}) == Config()
    assert config_from_dict({"optim": {"epochs": 70}}).optim == OptimConfig(epochs=70)


@pytest.mark.parametrize(
    ("plain", "named"),
    [
        ({"optim": {"epoch": 3}}, ["optim.epoch", "optim.epochs?"]),
        ({"filter": {"response": 3}}, ["filter.response"]),
        ({"zebra": 3}, ["zebra"]),
        ({3: 3}, ["3"]),
        ({"seed": "one"}, ["seed='one'"]),
        ({"seed": True}, ["seed=True"]),
        ({"seed": 1.5}, ["seed=1.5"]),
        ({"sync_bn": 1}, ["sync_bn=1"]),
        ({"out": 7}, ["out=7"]),
        ({"method": "moco"}, ["method='moco'"]),
        ({"filter": {"sigma": "steep"}}, ["filter.sigma='steep'"]),
        ({"filter": {"sigma": None}}, ["filter.sigma=None"]),
        ({"filter": {"sigma": True}}, ["filter.sigma=True"]),
        ({"filter": {"cutoff": 7.0}}, ["filter.cutoff=7.0"]),
        ({"optim": 3}, ["optim."]),
        ({"augment": {"view1": {"crop_scale": [0.1]}}}, ["augment.view1.crop_scale=[0.1]"]),
        ({"augment": {"view1": {"crop_scale": 0.1}}}, ["augment.view1.crop_scale=0.1"]),
        ({"augment": {"mean": ["x"]}}, ["augment.mean='x'"]),
        ({"method": "symsimsiam"}, ["symsimsiam", "predictor=none"]),
        *[(plain, ["table"]) for plain in (None, [], "text", 3)],
    ],
    ids=str,
)
def test_an_unusable_configuration_is_a_data_error(plain: Any, named: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        config_from_dict(plain)
    assert not [text for text in named if text not in str(caught.value)]


# ---- resume ----------------------------------------------------------------------------------


def test_the_rules_are_those_of_this_table() -> None:
    every = list(names(Config))
    by_rule = {each: {n for n in every if rule(n) == each} for each in ("schedule", "free", None)}
    assert by_rule[None] == set()
    assert by_rule["free"] == {
        *("data.root", "data.workers", "data.loader", "data.download", "device", "out"),
        *("data.on_bad_image", "data.max_bad", "parallel.bucket_mb", "parallel.static_graph"),
        "parallel.timeout",
        "data.timeout",
        *(name for name in every if name.startswith(("log.", "guard.", "step."))),
    }
    fixed = {"optim.optimizer", "optim.backend", "optim.accumulate"}
    assert by_rule["schedule"] == {name for name in every if name.startswith("optim.")} - fixed


def test_free_settings_may_change() -> None:
    check_resumable(through_yaml(config_to_dict(CONFIG)), CONFIG)
    changed = replace(
        CONFIG,
        out="elsewhere",
        device="cpu",
        data=replace(CONFIG.data, root="x", workers=9, download=True, loader="torch"),
        log=replace(CONFIG.log, every=3, tensorboard=True),
    )
    check_resumable(config_to_dict(CONFIG), changed)
    assert config_digest(changed) == config_digest(CONFIG)


def mismatch(changed: Config, *allow: str) -> str:
    with pytest.raises(ConfigMismatch) as caught:
        check_resumable(config_to_dict(CONFIG), changed, allow)
    return str(caught.value)


def test_identity_settings_may_not_change_and_all_are_listed() -> None:
    changed = replace(
        CONFIG,
        seed=1,
        model=replace(CONFIG.model, width=32),
        augment=replace(CONFIG.augment, view1=replace(CONFIG.augment.view1, crop_scale=(0.3, 1.0))),
        optim=replace(CONFIG.optim, epochs=80),
    )
    assert (
        "(augment.view1.crop_scale [0.5, 1.0] -> [0.3, 1.0], model.width 24 -> 32, seed 0 -> 1)"
        in mismatch(changed, "optim.epochs")
    )
    assert "--allow-change" not in mismatch(changed)
    assert config_digest(changed) != config_digest(CONFIG)


def test_schedule_settings_change_only_if_allowed_by_name() -> None:
    changed = replace(CONFIG, optim=replace(CONFIG.optim, epochs=80, base_lr=0.25))
    text = mismatch(changed)
    assert "optim.epochs 60 -> 80" in text and "--allow-change optim.epochs" in text
    text = mismatch(changed, "optim.epochs")
    assert "-> 0.25)" in text and "optim.epochs" not in text
    check_resumable(config_to_dict(CONFIG), changed, allow=("optim.epochs", "optim.base_lr"))


@pytest.mark.parametrize("name", ["seed", "model.width", "optim.optimizer", "optim.epoch", "out"])
def test_only_schedule_settings_can_be_allowed(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_allowed((name,))
    assert f"--allow-change {name}" in str(caught.value)


def test_a_configuration_of_an_older_version_resumes_with_the_defaults_it_had() -> None:
    old = config_to_dict(CONFIG)
    del old["data"]["workers"], old["filter"]["engine"]
    check_resumable(old, CONFIG)
    assert DataConfig().workers == CONFIG.data.workers


def test_a_setting_that_is_added_is_known_to_be_later() -> None:
    """The first saved configurations had 106 settings."""
    every = {*flat(config_to_dict(CONFIG))}
    assert every >= LATER and len(every - LATER) == 106, "name a new setting in LATER"
