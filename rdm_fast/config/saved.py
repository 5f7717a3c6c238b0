"""A run's configuration as plain values, and what of it may differ when the run is continued."""

import dataclasses
import difflib
import hashlib
import json
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rdm_fast.config import Config
from rdm_fast.errors import ConfigMismatch, DataError, UsageError

# ---- configuration as plain values -----------------------------------------------------------


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts of JSON and YAML values: tuples as lists, floats as floats.

    `config_from_dict` inverts it exactly, also through JSON or YAML text.

    Raises:
        UsageError: it holds a function, as a filter of kind=custom does.
    """
    if getattr(config, "kind", None) == "custom":
        raise UsageError(
            "a filter of kind=custom holds a function, which config.yaml cannot: use it in a loop "
            "of your own, or one of the other kinds here"
        )
    hints = get_type_hints(type(config))
    return {
        field.name: _plain(getattr(config, field.name), hints[field.name])
        for field in dataclasses.fields(config)
        if field.metadata.get("flag", True)
    }


def _plain(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item, get_args(hint)[0]) for item in value]
    return float(value) if hint is float else value


def config_from_dict(plain: dict[str, Any]) -> Config:
    """The configuration that `config_to_dict` wrote. Settings that are absent take their defaults.

    Raises:
        DataError: an unknown setting, or a value that its setting cannot have.
    """
    config: Config = _build(Config, plain, "")
    return config


def _build(cls: Any, plain: Any, prefix: str) -> Any:
    flags = {field.name for field in dataclasses.fields(cls) if field.metadata.get("flag", True)}
    hints = {name: hint for name, hint in get_type_hints(cls).items() if name in flags}
    if not isinstance(plain, dict):
        raise DataError(f"the saved configuration's {prefix or 'text'} is not a table of settings")
    for key in plain:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            meant = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise DataError(f"the saved configuration has an unknown setting {prefix}{key}{meant}")
    try:
        return cls(**{k: _value(hints[k], value, f"{prefix}{k}") for k, value in plain.items()})
    except ValueError as error:
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
        raise DataError(f"the saved configuration has {name}={value!r}, which it cannot be")
    return value


# ---- what may differ when a run is continued -------------------------------------------------

Rule = Literal["identity", "schedule", "free"]
RULES: dict[str, Rule] = {
    "method": "identity", "predictor": "identity", "model.": "identity", "filter.": "identity",
    "augment.": "identity", "seed": "identity", "precision": "identity", "sync_bn": "identity",
    "data.name": "identity", "data.root": "free", "data.download": "free", "data.loader": "free",
    "data.workers": "free", "data.classes": "identity", "data.verify": "identity",
    "data.on_bad_image": "free", "data.max_bad": "free",
    "optim.": "schedule", "optim.optimizer": "identity", "optim.backend": "identity",
    "optim.accumulate": "identity",
    "parallel.": "free", "parallel.compress": "identity",
    "log.": "free", "guard.": "free", "step.": "free", "device": "free", "out": "free",
}  # fmt: skip
"""identity: another run; schedule: only if --allow-change names it; free: may always differ.

A name ending in a point stands for the whole table; the longest match decides."""


def rule(name: str) -> Rule | None:
    """What may become of a dotted setting on resume; None if there is no rule for it."""
    matches = [key for key in RULES if name == key or (key[-1] == "." and name.startswith(key))]
    return RULES[max(matches, key=len)] if matches else None


def check_resumable(old: dict[str, Any], new: Config, allow: tuple[str, ...] = ()) -> None:
    """Make sure that a run started with one configuration may go on with another.

    Args:
        old: as `config_to_dict` gave it when the run was started.
        new: what is asked for now.
        allow: dotted names of schedule settings that may change, from --allow-change.

    Raises:
        ConfigMismatch: in one sentence every setting that may not differ, old -> new.
        UsageError: `allow` names something that --allow-change does not cover.
    """
    before, after = flat(config_to_dict(config_from_dict(old))), flat(config_to_dict(new))
    for name in allow:
        if name not in after or rule(name) != "schedule":
            raise UsageError(
                f"--allow-change {name}: only settings of optim.* may change within a run (not "
                "optim.optimizer, optim.backend, optim.accumulate); start anew with another --out"
            )
    changed = [n for n in after if before[n] != after[n] and rule(n) != "free" and n not in allow]
    if not changed:
        return
    listed = ", ".join(f"{name} {before[name]} -> {after[name]}" for name in changed)
    if all(rule(name) == "schedule" for name in changed):
        way_out = "add " + " ".join(f"--allow-change {name}" for name in changed)
    else:
        way_out = "leave that as it was"
    raise ConfigMismatch(
        f"the run in {new.out} was started with another configuration ({listed}): {way_out}, "
        "or start anew with another --out"
    )


def flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one table with dotted names."""
    settings: dict[str, Any] = {}
    for key, value in plain.items():
        name = prefix + key
        settings |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return settings


def config_digest(config: Config) -> str:
    """16 hex digits of everything that decides a run's result (all but the free settings)."""
    deciding = {n: v for n, v in flat(config_to_dict(config)).items() if rule(n) != "free"}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]
