"""A configuration as plain values, and which settings may differ when a run is resumed."""

import dataclasses
import hashlib
import json
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rdm_fast.config import Config, PrototypesConfig
from rdm_fast.config.checks import did_you_mean, shown
from rdm_fast.errors import ConfigMismatch, DataError, UsageError

# ---- configuration as plain values -----------------------------------------------------------


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts of JSON and YAML values: tuples as lists, floats as floats.

    `config_from_dict` inverts it exactly, also after a trip through JSON or YAML text.

    Raises:
        UsageError: the filter holds a function, which text cannot.
    """
    if getattr(config, "kind", None) == "custom":
        raise UsageError(
            "filter.kind=custom holds a function, which config.yaml cannot: use it in your own "
            "training loop, or choose another filter.kind"
        )
    return {
        name: _plain(getattr(config, name), hint) for name, hint in _hints(type(config)).items()
    }


def _hints(cls: Any) -> dict[str, Any]:
    """The type of each setting that is saved, by name."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.metadata.get("saved", True)}


def _plain(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item, get_args(hint)[0]) for item in value]
    return float(value) if hint is float else value


def config_from_dict(plain: dict[str, Any]) -> Config:
    """The configuration that `config_to_dict` wrote. Missing settings get their defaults.

    Raises:
        DataError: an unknown setting, or a value of the wrong type or range.
    """
    config: Config = _build(Config, plain, "")
    return config


def _build(cls: Any, plain: Any, prefix: str) -> Any:
    hints = _hints(cls)
    if not isinstance(plain, dict):
        raise DataError(f"the saved configuration's {prefix or 'text'} is not a table of settings")
    if unknown := [str(key) for key in plain if key not in hints]:
        fix = did_you_mean(prefix + unknown[0], [prefix + name for name in hints], "remove it")
        raise DataError(f"the saved configuration has no setting {prefix}{unknown[0]}: {fix}")
    try:
        return cls(**{k: _value(hints[k], value, f"{prefix}{k}") for k, value in plain.items()})
    except UsageError as error:
        raise DataError(f"the saved configuration cannot be used: {error}") from error


def _value(hint: Any, value: Any, name: str) -> Any:
    """One setting, checked against its type."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{name}.")
    if get_origin(hint) is Literal:
        fits = value in get_args(hint)
    elif get_origin(hint) is tuple:
        item, *rest = get_args(hint)
        fits = isinstance(value, list) and (rest == [...] or len(value) == 1 + len(rest))
        if fits:
            return tuple(_value(item, each, name) for each in value)
    elif hint is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-3, without a point, as text
            with suppress(ValueError):
                value = float(value)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = type(value) is hint
    if not fits:
        raise DataError(
            f"the saved configuration has {name}={shown(value)}, which is not a valid value"
        )
    return value


# ---- what may differ when a run is resumed ---------------------------------------------------

Rule = Literal["identity", "schedule", "free"]
RULES: dict[str, Rule] = {
    "method": "identity", "predictor": "identity", "model.": "identity", "filter.": "identity",
    "prototypes.": "identity",
    "augment.": "identity", "seed": "identity", "precision": "identity", "sync_bn": "identity",
    "data.name": "identity", "data.root": "free", "data.download": "free", "data.loader": "free",
    "data.workers": "free", "data.timeout": "free",
    "data.classes": "identity", "data.verify": "identity", "data.fraction": "identity",
    "data.image_column": "identity", "data.label_column": "identity",
    "data.on_bad_image": "free", "data.max_bad": "free", "data.white_level": "identity",
    "optim.": "schedule", "optim.optimizer": "identity", "optim.backend": "identity",
    "optim.accumulate": "identity",
    "parallel.": "free", "parallel.compress": "identity",
    "log.": "free", "guard.": "free", "step.": "free", "device": "free", "out": "free",
}  # fmt: skip
"""identity: a change makes another run; schedule: may change if --allow-change names it; free: may
always change.

A name that ends in a point stands for the whole table; the longest match decides."""
LATER = {
    "augment.small_blur", "data.fraction", "data.image_column", "data.label_column",
    "data.timeout", "data.white_level", "model.frozen_patch",
    "model.init_prefix", "model.patch_size", "model.projector_activation",
    "model.projector_hidden_bn", "optim.clip_each", "optim.clip_norm", "optim.weight_decay_end",
    "parallel.timeout", *(f"prototypes.{name}" for name in _hints(PrototypesConfig)),
    "step.deterministic",
}  # fmt: skip
"""Settings that runs of earlier versions lack. Each has a default that changes nothing for them."""


def rule(name: str) -> Rule | None:
    """The rule for a dotted setting; None if there is none."""
    matches = [key for key in RULES if name == key or (key[-1] == "." and name.startswith(key))]
    return RULES[max(matches, key=len)] if matches else None


def deciding_changes(old: Config, new: Config) -> dict[str, str]:
    """Settings that decide a run's result and differ: `old -> new`, by dotted name."""
    before, after = flat(config_to_dict(old)), flat(config_to_dict(new))
    return {
        name: f"{before[name]} -> {after[name]}"
        for name in after
        if before[name] != after[name] and rule(name) != "free"
    }


def check_allowed(allow: tuple[str, ...]) -> None:
    """Check the names in --allow-change.

    Raises:
        UsageError: it does not cover a setting, or there is none of this name.
    """
    known = [name for name in flat(config_to_dict(Config())) if rule(name) == "schedule"]
    for name in allow:
        if name not in known:
            raise UsageError(
                f"--allow-change {name}: only settings of optim.* can change within a run (not "
                "optim.optimizer, optim.backend, optim.accumulate); "
                + did_you_mean(name, known, "start a new run with --out")
            )


def check_resumable(old: dict[str, Any], new: Config, allow: tuple[str, ...] = ()) -> None:
    """Check that a run can be resumed with another configuration.

    Args:
        old: what `config_to_dict` returned when the run was started.
        new: the configuration requested now.
        allow: dotted names of schedule settings that may change, from --allow-change.

    Raises:
        ConfigMismatch: settings differ that may not. The message lists them all.
    """
    changes = deciding_changes(config_from_dict(old), new)
    changed = {name: change for name, change in changes.items() if name not in allow}
    if not changed:
        return
    listed = ", ".join(f"{name} {change}" for name, change in changed.items())
    fix = "restore these settings"
    if all(rule(name) == "schedule" for name in changed):
        fix = "add " + " ".join(f"--allow-change {name}" for name in changed)
    raise ConfigMismatch(
        f"the run in {new.out} was started with another configuration ({listed}): {fix}, "
        "or start a new run with another --out"
    )


def flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one table with dotted names."""
    settings: dict[str, Any] = {}
    for key, value in plain.items():
        name = prefix + key
        settings |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return settings


def config_digest(config: Config) -> str:
    """16 hex digits of the settings that decide a run's result (all but the free ones)."""
    deciding = {n: v for n, v in flat(config_to_dict(config)).items() if rule(n) != "free"}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]
