"""Every number of every command has bounds: outside, code 2 names the flag; inside, it trains."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import field, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from rdm_fast.cli.commands import COMMANDS
from rdm_fast.cli.parse import parse
from rdm_fast.config import Config
from rdm_fast.config.checks import Between
from rdm_fast.errors import NonFinite, UsageError
from tests.forks import call
from tests.runs import run
from tests.tiny import tiny, with_small_views

VALUES = ["-1", "0", "nan", "inf", "-inf", "1e309", str(10**20), str(2**63), "9" * 5000, "x", ""]
OUTSIDE = {int: ["-1", str(2**63)], float: ["nan", "-inf", "1e309"]}
"""A value on each side of any bounds; the first number of each type gets all VALUES."""
NEEDED = {"eval": ["x"], "export": ["x", "--to", "timm"], "report": ["x"]}
"""What a command cannot do without."""

Numbers = dict[str, tuple[type, Any]]
"""Type of the numbers and annotations of each setting that is a number, or a tuple of them."""


def numbers(kind: Any) -> Numbers:
    found: Numbers = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        plain, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        item = get_args(plain)[0] if get_origin(plain) is tuple else plain
        if item in (int, float):
            found[name] = item, notes
        elif is_dataclass(plain) and plain is not Config:
            found |= {f"{name}.{inner}": each for inner, each in numbers(plain).items()}
    return found


def parts() -> Iterator[tuple[str, type]]:
    """Each command's own options, the whole configuration's, and each table of the latter.

    A table alone is parsed in a tenth of the time.
    """
    yield from ((name, each.options) for name, each in COMMANDS.items())
    yield "config", Config
    for name, hint in get_type_hints(Config).items():
        if is_dataclass(hint):
            alone = make_dataclass("Alone", [(name, hint, field(default_factory=hint))])
            yield f"config {name}", alone


PARTS = {part: (kind, numbers(kind)) for part, kind in parts()}
FLAGS = [
    (part, name)
    for part, (_, found) in PARTS.items()
    for name in found
    if part != "config" or "." not in name
]


def test_the_walk_finds_every_table() -> None:
    """A number that is hidden from it would have no bounds."""
    found = {f"{part} {name}" for part, name in FLAGS}
    samples = {"eval lr", "doctor batches", "config seed", "config augment augment.view2.hue"}
    assert samples <= found
    assert len(found) > 60


def few_and_all() -> Iterator[Any]:
    """Each number with a few values, or with all where reading a command line takes minutes."""
    seen = set()
    for part, name in FLAGS:
        item, _ = PARTS[part][1][name]
        first, _ = item not in seen, seen.add(item)
        yield pytest.param(part, name, VALUES if first else OUTSIDE[item], id=f"{part}-{name}")
        if not first:
            yield pytest.param(part, name, VALUES, id=f"{part}-{name}-all", marks=pytest.mark.slow)


@pytest.mark.parametrize(("part", "name", "values"), [*few_and_all()])
def test_a_number_outside_its_bounds_is_a_usage_error_that_names_its_flag(
    part: str, name: str, values: list[str]
) -> None:
    kind, found = PARTS[part]
    item, notes = found[name]
    (bounds,) = [note for note in notes if isinstance(note, Between)]
    assert max(abs(bounds.low), abs(bounds.high)) < float("inf")
    count = 2 if bounds.rising else 3 if name in ("mean", "std") else 1
    for value in values:
        words = [*NEEDED.get(part, []), f"--{name.replace('_', '-')}", *[value] * count]
        inside = False
        with suppress(ValueError):
            inside = bounds.holds(item(value))
        try:
            parse(kind, words)
        except UsageError as error:
            assert name.rpartition(".")[2] in str(error).replace("-", "_"), words
            assert "\n" not in str(error) and "base 10" not in str(error) and len(str(error)) < 300
        else:
            assert inside, words


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("train.py --optim.lars-eta nan", "optim.lars_eta=nan"),
        ("train.py --seed 9223372036854775808", "seed=9223372036854775808"),
        ("train.py --model.width 100000000000000000000", "model.width=1000"),
        ("train.py --augment.size 100000", "augment.size=100000"),
        ("train.py --allow-change nonsense", "--allow-change nonsense"),
        ("train.py --nproc 99999999999999999999", "nproc=9999"),
        ("eval_linear.py x --lr nan", "--lr=nan"),
        ("eval_linear.py x --seed -1", "--seed=-1"),
        ("rdm report x --images 1e3", "--images"),
        ("rdm sweep --jobs -1", "--jobs=-1"),
    ],
)
def test_the_commands_end_with_code_2(line: str, named: str, tmp_path: Path) -> None:
    done = call(*line.split(), cwd=tmp_path)  # type: ignore[arg-type]
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


# ---- what is accepted trains -----------------------------------------------------------------

LARGE = (
    *("epochs", "global_batch", "accumulate", "width", "projector_hidden", "projector_dim"),
    *("predictor_hidden", "size", "small_size", "small_views", "workers"),
)
"""Their upper bounds ask for memory or time, not for other arithmetic."""


FOR_FILES = ("white_level",)
"""Only image files take these; their own tests train with them."""


def at_bounds() -> Iterator[tuple[str, float]]:
    for name, (item, notes) in numbers(Config).items():
        if name.rpartition(".")[2] in FOR_FILES:
            continue
        for bounds in (note for note in notes if isinstance(note, Between)):
            least = {int: 1, float: 5e-324}[item] if bounds.above else bounds.low
            yield name, least
            if name.rpartition(".")[2] not in LARGE:
                yield name, bounds.high


def changed(config: Any, name: str, value: float) -> Any:
    first, _, rest = name.partition(".")
    old = getattr(config, first)
    new = changed(old, rest, value) if rest else value
    return replace(config, **{first: (new,) * len(old) if isinstance(old, tuple) else new})


def trains(path: Path, name: str, value: float) -> None:
    """A few steps end well, or with what becomes of a model that is not finite."""
    recipe = "digits_byol" if "ema" in name or "small" in name else "digits_rdm_simsiam"
    config: Any = with_small_views(recipe) if "small" in name else tiny(recipe, size=16)
    if "lars" in name:
        config = changed(config, "optim.optimizer", "lars")  # type: ignore[arg-type]
    for on in ("jitter", "blur"):  # so that their strengths count
        config = changed(config, f"augment.view1.{on}", 1.0)
    config = changed(config, "optim.epochs", 1)
    if name == "optim.global_batch":
        value = 2  # a batch norm needs two
    if name == "optim.warmup_epochs":
        value = min(value, 1)
    if name == "filter.cutoff":
        value = min(value, 0.999)
    with suppress(NonFinite):
        run(path, changed(config, name, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**63 - 1),
        ("optim.final_lr", 1e6),
        ("optim.lars_eta", 1e6),
        ("filter.sigma", -100.0),
        ("augment.view1.crop_scale", 5e-324),
    ],
)
def test_an_extreme_number_trains(name: str, value: float, tmp_path: Path) -> None:
    trains(tmp_path / "run", name, value)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [*at_bounds()])
def test_every_number_trains_at_its_bounds(name: str, value: float, tmp_path: Path) -> None:
    trains(tmp_path / "run", name, value)
