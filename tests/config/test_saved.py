"""rdm_fast.config.saved: every recipe through text and back, and what a resume may change."""

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest
import yaml

from rdm_fast.config import Config, DataConfig, OptimConfig
from rdm_fast.config.recipes import RECIPES
from rdm_fast.config.saved import (
    check_resumable,
    config_digest,
    config_from_dict,
    config_to_dict,
    rule,
)
from rdm_fast.errors import ConfigMismatch, DataError, UsageError

CONFIG = RECIPES["digits_rdm_simsiam"]()


def through_yaml(plain: dict[str, Any]) -> Any:
    return yaml.safe_load(yaml.safe_dump(plain, sort_keys=False))


def through_json(plain: dict[str, Any]) -> Any:
    return json.loads(json.dumps(plain, allow_nan=False))


def names(cls: Any, prefix: str = "") -> list[str]:
    """Dotted names of all settings, from the dataclasses themselves."""
    found: list[str] = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            found += names(field.type, f"{prefix}{field.name}.")
        else:
            found.append(prefix + field.name)
    return found


# ---- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize("through", [through_yaml, through_json])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_survives_text_exactly(recipe: str, through: Any) -> None:
    config = RECIPES[recipe]()
    plain = config_to_dict(config)
    assert through(plain) == plain
    restored = config_from_dict(through(plain))
    assert restored == config
    assert hash(restored) == hash(config)  # lists became tuples again, or this would raise
    assert config_to_dict(restored) == plain


def test_floats_survive_to_the_last_bit() -> None:
    for value in (0.1 + 0.2, 1e-3, 3e-5, 5e-324, 1.7976931348623157e308, 1 / 3):
        config = replace(CONFIG, optim=replace(CONFIG.optim, base_lr=value))
        for through in (through_yaml, through_json):
            assert config_from_dict(through(config_to_dict(config))).optim.base_lr == value


def test_a_whole_number_in_a_float_setting_reads_the_same_as_a_float() -> None:
    whole = replace(CONFIG, optim=replace(CONFIG.optim, warmup_epochs=2))
    point = replace(CONFIG, optim=replace(CONFIG.optim, warmup_epochs=2.0))
    assert json.dumps(config_to_dict(whole)) == json.dumps(config_to_dict(point))


def test_a_float_written_without_a_point_is_a_float() -> None:
    plain = yaml.safe_load("filter: {cutoff: 1e-4}")
    assert plain["filter"]["cutoff"] == "1e-4"  # YAML 1.1
    assert config_from_dict(plain).filter.cutoff == 1e-4


def test_absent_settings_take_their_defaults() -> None:
    assert config_from_dict({}) == Config()
    assert config_from_dict({"optim": {"epochs": 70}}).optim == OptimConfig(epochs=70)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"optim": {"epoch": 3}}, r"unknown setting optim\.epoch; did you mean optim\.epochs\?"),
        ({"zebra": 3}, r"unknown setting zebra$"),
        ({3: 3}, "unknown setting 3"),
        ({"seed": "one"}, "seed='one'"),
        ({"seed": True}, "seed=True"),
        ({"seed": 1.5}, r"seed=1\.5"),
        ({"sync_bn": 1}, "sync_bn=1"),
        ({"out": 7}, "out=7"),
        ({"method": "moco"}, "method='moco'"),
        ({"filter": {"sigma": "steep"}}, r"filter\.sigma='steep'"),
        ({"filter": {"sigma": None}}, r"filter\.sigma=None"),
        ({"filter": {"cutoff": 7.0}}, r"filter\.cutoff=7\.0"),
        ({"optim": 3}, r"optim\. is not a table"),
        ({"augment": {"view1": {"crop_scale": [0.1]}}}, r"augment\.view1\.crop_scale=\[0\.1\]"),
        ({"augment": {"view1": {"crop_scale": 0.1}}}, r"augment\.view1\.crop_scale=0\.1"),
        ({"augment": {"mean": ["x"]}}, r"augment\.mean='x'"),
        ({"method": "symsimsiam"}, "symsimsiam has predictor=none"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_a_data_error(plain: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        config_from_dict(plain)


@pytest.mark.parametrize("plain", [None, [], "text", 3])
def test_what_is_no_table_is_a_data_error(plain: Any) -> None:
    with pytest.raises(DataError, match="not a table"):
        config_from_dict(plain)


# ---- resume ----------------------------------------------------------------------------------


def test_every_setting_has_a_rule() -> None:
    assert [name for name in names(Config) if rule(name) is None] == []


def test_the_rules_are_those_of_the_table() -> None:
    by_rule: dict[Any, set[str]] = {"identity": set(), "schedule": set(), "free": set()}
    for name in names(Config):
        by_rule[rule(name)].add(name)
    assert by_rule["free"] == {
        *("data.root", "data.workers", "data.loader", "data.download", "device", "out"),
        *("data.on_bad_image", "data.max_bad", "parallel.bucket_mb", "parallel.static_graph"),
        *(name for name in names(Config) if name.startswith(("log.", "guard.", "step."))),
    }
    assert by_rule["schedule"] == {name for name in names(Config) if name.startswith("optim.")} - {
        "optim.optimizer",
        "optim.backend",
        "optim.accumulate",
    }


def test_the_same_configuration_resumes() -> None:
    check_resumable(through_yaml(config_to_dict(CONFIG)), CONFIG)


def test_free_settings_may_change() -> None:
    changed = replace(
        CONFIG,
        out="elsewhere",
        device="cpu",
        data=replace(CONFIG.data, root="x", workers=9, download=True, loader="torch"),
        log=replace(CONFIG.log, every=3, tensorboard=True),
    )
    check_resumable(config_to_dict(CONFIG), changed)
    assert config_digest(changed) == config_digest(CONFIG)


def test_identity_settings_may_not_change_and_all_are_listed() -> None:
    changed = replace(
        CONFIG,
        seed=1,
        model=replace(CONFIG.model, width=32),
        augment=replace(CONFIG.augment, view1=replace(CONFIG.augment.view1, crop_scale=(0.3, 1.0))),
        optim=replace(CONFIG.optim, epochs=80),
    )
    with pytest.raises(ConfigMismatch) as caught:
        check_resumable(config_to_dict(CONFIG), changed, allow=("optim.epochs",))
    assert str(caught.value) == (
        f"the run in {CONFIG.out} was started with another configuration "
        "(augment.view1.crop_scale [0.5, 1.0] -> [0.3, 1.0], model.width 24 -> 32, seed 0 -> 1): "
        "leave that as it was, or start anew with another --out"
    )
    assert config_digest(changed) != config_digest(CONFIG)


def test_schedule_settings_need_to_be_allowed_by_name() -> None:
    changed = replace(CONFIG, optim=replace(CONFIG.optim, epochs=80, base_lr=0.25))
    old = config_to_dict(CONFIG)
    with pytest.raises(ConfigMismatch, match=r"optim\.epochs 60 -> 80.*--allow-change optim\.epo"):
        check_resumable(old, changed)
    with pytest.raises(ConfigMismatch, match=r"\(optim\.base_lr [\d.]+ -> 0\.25\): add"):
        check_resumable(old, changed, allow=("optim.epochs",))
    check_resumable(old, changed, allow=("optim.epochs", "optim.base_lr"))


@pytest.mark.parametrize("name", ["seed", "model.width", "optim.optimizer", "optim.epoch", "out"])
def test_only_schedule_settings_can_be_allowed(name: str) -> None:
    with pytest.raises(UsageError, match=f"--allow-change {name}"):
        check_resumable(config_to_dict(CONFIG), CONFIG, allow=(name,))


def test_a_configuration_of_an_older_version_resumes_with_the_defaults_it_had() -> None:
    old = config_to_dict(CONFIG)
    del old["data"]["workers"], old["filter"]["engine"]
    check_resumable(old, CONFIG)
    assert DataConfig().workers == CONFIG.data.workers
