"""rdm_fast.cli.parse against the words a user types, and the messages that answer mistakes."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import get_type_hints

import pytest

from rdm_fast.cli.flags import ALIASES, flags
from rdm_fast.cli.parse import TrainCommand, parse_evaluate, parse_train
from rdm_fast.config import Config, FilterConfig
from rdm_fast.config.recipes import DEFAULT, RECIPES, recipe
from rdm_fast.errors import UsageError
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.evaluation.protocols import PROTOCOLS
from rdm_fast.tools.doctor.options import DoctorCommand
from rdm_fast.tools.export.options import ExportCommand
from rdm_fast.tools.report.options import ReportCommand
from rdm_fast.tools.sweep.options import SweepCommand


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def message(*words: str) -> str:
    """What `train.py` answers to words it cannot accept: one line."""
    with pytest.raises(UsageError) as caught:
        parse_train(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def evaluate_message(*words: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_evaluate(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def get(config: object, flag: str) -> object:
    """The value that a flag such as --optim.base-lr sets."""
    for name in flag.removeprefix("--").replace("-", "_").split("."):
        config = getattr(config, name)
    return config


# ---- what is meant ----------------------------------------------------------------------------


def test_no_words_mean_the_default_recipe() -> None:
    command = parse_train([])
    assert command == TrainCommand(config=recipe(DEFAULT))
    assert command.resume is None and not command.overwrite and not command.debug


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_word_names_a_recipe_and_its_run_folder(name: str) -> None:
    assert parse_train([name]).config == replace(RECIPES[name](), out=f"runs/{name}")


def test_a_flag_changes_its_field_and_no_other() -> None:
    config = parse_train(["digits_byol", "--optim.epochs", "7"]).config
    before = recipe("digits_byol")
    assert config == replace(before, optim=replace(before.optim, epochs=7))


ALIASED = {
    "--pred-type": "log_1",
    "--pred-location": "online",
    "--sigma": 2.0,
    "--arch": "resnet34",
    "--epochs": 5,
    "--batch-size": 128,
    "--lr": 0.3,
    "--wd": 1e-3,
    "--momentum": 0.8,
    "--workers": 3,
    "--on-bad-image": "stop",
    "--max-bad": 0.2,
    "--guard": "stop",
    "--init": "other.pth",
}


def test_every_alias_is_tested() -> None:
    assert set(ALIASED) == set(ALIASES)


@pytest.mark.parametrize("alias", ALIASED)
def test_an_alias_sets_the_field_it_stands_for(alias: str) -> None:
    value = ALIASED[alias]
    for words in ([alias, str(value)], [f"{alias}={value}"], [alias.replace("-", "_"), str(value)]):
        words[0] = words[0].replace("__", "--", 1)
        config = parse_train(words).config
        assert get(config, ALIASES[alias]) == value
        assert get(recipe(DEFAULT), ALIASES[alias]) != value


def test_the_papers_three_flags_and_a_negative_exponent_are_understood() -> None:
    words = ["--pred-type", "poly", "--pred-location", "target", "--sigma", "-0.7"]
    found = parse_train(words).config.filter
    assert (found.kind, found.location, found.sigma) == ("poly", "target", -0.7)


@pytest.mark.parametrize("word", ["--optim.global_batch=100", "--optim.global-batch=100"])
def test_underscore_and_hyphen_are_alike(word: str) -> None:
    assert parse_train([word]).config.optim.global_batch == 100


def test_a_value_keeps_its_underscores() -> None:
    assert parse_train(["--out=a_b", "--pred_type=log_2"]).config.out == "a_b"


def test_switches_and_their_opposites() -> None:
    assert parse_train(["--no-sync-bn"]).config.sync_bn is False
    assert parse_train(["--data.download"]).config.data.download is True
    assert parse_train(["--data.no-download"]).config.data.download is False
    assert parse_train(["--overwrite", "--debug"]).overwrite is True


def test_tuples_take_several_words() -> None:
    config = parse_train(
        [
            "--augment.view2.crop-scale",
            "0.3",
            "0.9",
            "--allow-change",
            "optim.epochs",
            "optim.base_lr",
        ]
    )
    assert config.config.augment.view2.crop_scale == (0.3, 0.9)
    assert config.config.augment.view1 == recipe(DEFAULT).augment.view1
    assert config.allow_change == ("optim.epochs", "optim.base_lr")


def test_the_last_of_two_equal_flags_counts() -> None:
    assert parse_train(["--seed", "3", "--optim.epochs", "4", "--seed", "9"]).config.seed == 9


# ---- what cannot be meant ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("--optim.epoch", "--optim.epochs"),
        ("--sigm", "--sigma"),
        ("--pred_typ", "--pred-type"),
        ("--filter.cut-off=0.1", "--filter.cutoff"),
        ("--SEED", "--seed"),
        ("--overwite", "--overwrite"),
        ("--batchsize", "--batch-size"),
        ("--halp", "--help"),
    ],
)
def test_an_unknown_flag_is_told_the_nearest(word: str, near: str) -> None:
    flag = word.partition("=")[0].replace("_", "-")
    assert message(word) == f"unknown flag {flag}: did you mean {near}? (--help lists all)"


def test_a_flag_near_to_none_is_sent_to_help() -> None:
    assert message("--qqqqqqqqqq") == "unknown flag --qqqqqqqqqq: --help lists all"
    assert message("-x").startswith("unknown flag -x")


def test_an_unknown_recipe_is_told_the_nearest() -> None:
    assert message("digit_byol") == (
        "unknown recipe digit_byol: did you mean digits_byol? (--help lists all)"
    )
    assert message("qqqq") == "unknown recipe qqqq: --help lists all"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--optim.epochs three", "--optim.epochs takes a whole number, not 'three'"),
        ("--seed 1e3", "--seed takes a whole number, not '1e3'"),
        ("--lr x", "--optim.base-lr takes a number, not 'x'"),
        ("--augment.view1.crop-scale a 1", "--augment.view1.crop-scale takes numbers, not ['a'"),
        ("--filter.kind pol", "--filter.kind cannot be 'pol': use one of 'poly', 'log', 'log_1'"),
        ("--device gpu", "--device cannot be 'gpu': use one of 'auto', 'cpu', 'cuda'"),
        ("--sync-bn false", "a value too many: false"),
        ("digits_byol 7", "a value too many: 7"),
        ("--seed", "--seed needs a value"),
        ("--augment.view1.crop-scale 0.5", "--augment.view1.crop-scale needs 2 values"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_flag(words: str, expected: str) -> None:
    assert message(*words.split()).startswith(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--method byol --predictor none", "method=byol with predictor=none: symsimsiam has"),
        ("--method symsimsiam", "method=symsimsiam with predictor=spectral: symsimsiam has"),
        ("--filter.basis online --filter.location online", "filter.basis=online concerns the"),
        ("--filter.center --filter.engine reference", "filter.engine=reference is the paper's"),
        (
            "--filter.kind custom",
            "filter.kind=custom is for Python code, FilterConfig(kind='custom'",
        ),
        ("--filter.sigma nan", "filter.sigma=nan is not a finite number"),
        ("--filter.cutoff 2", "filter.cutoff=2.0 is not a share of the largest singular value"),
        ("--model.stem imagenet", "model.stem=imagenet does not exist for model.backbone=resnet8"),
        ("--model.projector-layers 4", "model.projector_layers=4: a projector has 2 or 3"),
        ("--model.width 0", "model.width=0: give 1 or more channels"),
        ("--optim.warmup-epochs 61", "optim.warmup_epochs=61.0 is longer than optim.epochs=60"),
        ("--optim.epochs 0", "optim.epochs=0: give 1 or more"),
        ("--lr -1", "optim.base_lr=-1.0: give a number of 0 or more"),
        ("--momentum 1.5", "optim.momentum=1.5 is not a probability"),
        ("--augment.view2.jitter 2", "augment.view2.jitter=2.0 is not a probability"),
        ("--augment.view1.crop-scale 0.9 0.1", "augment.view1.crop_scale=(0.9, 0.1) is not a"),
        ("--augment.view1.crop-ratio 0 1", "augment.view1.crop_ratio=(0.0, 1.0): give two"),
        ("--augment.view1.blur-sigma 2 1", "augment.view1.blur_sigma=(2.0, 1.0): give two"),
        ("--augment.view1.rotate 181", "augment.view1.rotate=181.0: give 0 to 180 degrees"),
        ("--augment.view1.shear 90", "augment.view1.shear=90.0: give 0 to less than 90"),
        ("--augment.view1.hue 0.6", "augment.view1.hue=0.6: give a share of the color circle"),
        ("--augment.view1.contrast 2", "augment.view1.contrast=2.0: give a number from 0"),
        ("--augment.mean 0.1 0.2", "augment.mean has 2 and augment.std 1 channels"),
        ("--augment.std 0", "augment.mean=(0.3053,) and augment.std=(0.0,): give finite means"),
        ("--augment.size 4", "augment.size=4: a view has at least 8 pixels"),
        (
            "--augment.small-views 2 --augment.small-size 8",
            "augment.small_views=2 with method=simsiam: small views need",
        ),
        ("--augment.small-views 2", "augment.small_size=96 is more than augment.size=16"),
        ("--augment.small-views -1", "augment.small_views=-1: give 0 or more views"),
        ("--augment.small-size 7", "augment.small_size=7: a view has at least 8 pixels"),
        ("--augment.small-scale 0.3 0.1", "augment.small_scale=(0.3, 0.1) is not a range"),
        ("--workers -1", "data.workers=-1: give 0 or more processes"),
        ("--log.keep 1", "log.keep=1: at least 2, one may be damaged"),
        ("--log.every 0", "log.every=0: give 1 or more"),
        ("--log.spectrum-every -1", "log.spectrum_every=-1: give 0 (never) or more"),
        ("--guard.min-rank nan", "guard.min_rank=nan: give a number of 0 (never) or more"),
        ("--guard.min-std -1", "guard.min_std=-1.0: give a number of 0 (never) or more"),
        ("--guard.warmup 2", "guard.warmup=2.0 is not a probability"),
        ("--guard.patience 0", "guard.patience=0: give 1 or more lines"),
        ("--log.knn-every -1", "log.knn_every=-1: give 0 (never) or more"),
        ("--seed -1", "seed=-1: give 0 or more"),
        ("--optim.global-batch 200 --optim.accumulate 3", "optim.global_batch=200 does not give"),
    ],
)
def test_an_impossible_setting_is_named_with_what_was_found(words: str, expected: str) -> None:
    assert message(*words.split()).startswith(expected)


@pytest.mark.parametrize(
    "words",
    [
        "digits_byol --resume x",
        "--resume x --lr 0.1",
        "--resume x --optim.epochs=9",
        "--resume x --overwrite",
        "--resume x --allow-change optim.epochs",
        "--resume x --out y",
    ],
)
def test_resume_takes_no_other_configuration(words: str) -> None:
    """--overwrite beside it would delete the very run that is to be continued."""
    text = message(*words.split())
    assert text.startswith("--resume takes the configuration from the run folder")
    culprit = next(w for w in words.split() if w not in ("--resume", "x")).partition("=")[0]
    assert f"leave out {ALIASES.get(culprit, culprit)}" in text


def test_resume_alone_is_understood_whatever_the_default_recipe_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ranks are checked against the run's own configuration, which is not known yet."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    command = parse_train(["--resume", "runs/x", "--debug"])
    assert command.resume == "runs/x" and command.debug


def test_a_global_batch_that_does_not_divide_over_the_ranks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert message("--batch-size", "200") == (
        "optim.global_batch=200 does not give each of 3 rank(s) the same 2 or more images: "
        "use 198 or 201"
    )
    assert parse_train(["--batch-size", "201"]).config.optim.global_batch == 201


# ---- eval_linear.py ---------------------------------------------------------------------------


def test_evaluate_takes_a_folder_and_its_flags() -> None:
    command = parse_evaluate(
        [
            "runs/x",
            "--protocol",
            "closed-form",
            "--data_root",
            "d",
            "--batch",
            "8",
            "--seed",
            "3",
            "--device",
            "cpu",
        ]
    )
    assert command == EvaluateCommand(
        checkpoint="runs/x", protocol="closed-form", data_root="d", batch=8, seed=3, device="cpu"
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_evaluate_knows_every_protocol(protocol: str) -> None:
    assert parse_evaluate(["x", "--protocol", protocol]).protocol == protocol


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "name a run folder, or a step folder inside its checkpoints"),
        ("x y", "a value too many: y"),
        ("x --protocol closed", "protocol=closed is unknown: use "),
        ("x --batch 0", "batch=0: give 1 or more images"),
        ("x --batch many", "--batch takes a whole number, not 'many'"),
        ("x --device gpu", "device=gpu is unknown: use auto, cpu or cuda"),
        ("x --protocl y", "unknown flag --protocl: did you mean --protocol?"),
        ("x --batch-size 3", "unknown flag --batch-size: did you mean --batch?"),
        ("--checkpoint x", "unknown flag --checkpoint"),
    ],
)
def test_evaluate_names_what_it_cannot_use(words: str, expected: str) -> None:
    assert evaluate_message(*words.split()).startswith(expected)


# ---- help -------------------------------------------------------------------------------------


def dataclasses_of(kind: type) -> Iterator[type]:
    """A dataclass and every dataclass among its fields."""
    yield kind
    for hint in get_type_hints(kind).values():
        if is_dataclass(hint) and isinstance(hint, type):
            yield from dataclasses_of(hint)


KINDS = (
    TrainCommand, EvaluateCommand, DoctorCommand, ExportCommand, ReportCommand, SweepCommand,
)  # fmt: skip
COMMANDS = list(dict.fromkeys(each for kind in KINDS for each in dataclasses_of(kind)))


def sentences(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass, read from its source."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            is_text = isinstance(text, ast.Constant) and isinstance(text.value, str)
            found[field.target.id] = text.value if is_text else ""
    return found


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_every_field_has_a_sentence_of_help(kind: type) -> None:
    texts, hints = sentences(kind), get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):  # a table, whose own docstring is shown instead
            assert (hints[field.name].__doc__ or "").strip().endswith(".")
        else:
            text = texts[field.name]
            assert len(text) > 10 and text.endswith((".", ")")), f"{field.name}: {text!r}"


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_every_field_has_a_default_but_those_that_say_what_to_work_on(kind: type) -> None:
    without = {
        field.name
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    }
    assert without <= {"config", "checkpoint", "to"}


def help_text(parse: object, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse([*words, "--help"])  # type: ignore[operator]
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_train_help_shows_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_text(parse_train, capsys)
    options = shown.partition("show this help message")[2]
    entries = re.split(r"^. (?=--[a-z])", options, flags=re.MULTILINE)[1:]
    listed = {entry.split()[0].rstrip(",") for entry in entries}
    expected = {flag for flag in flags(TrainCommand) if "no-" not in flag}
    assert listed == expected
    for entry in entries:
        assert "(default:" in entry, entry


def test_evaluate_help_shows_every_flag_and_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_text(parse_evaluate, capsys)
    for word in (*flags(EvaluateCommand), *PROTOCOLS):
        assert word in shown, word


def test_train_help_names_every_recipe_and_short_name(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_text(parse_train, capsys)
    for name in RECIPES:
        assert f"  {name}: " in shown
    for alias, flag in ALIASES.items():
        assert f"  {alias}: {flag}" in shown


def test_help_shows_the_values_of_the_recipe_that_was_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = help_text(parse_train, capsys, "cifar10_byol")
    assert "Train cifar10_byol" in shown or "(cifar10_byol here)" in shown
    assert "(default: lars)" in shown and "(default: 400)" in shown


def test_a_response_is_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "filter.response" not in help_text(parse_train, capsys)
    assert message("--filter.response", "f").startswith("unknown flag --filter.response")


def test_flags_lists_every_leaf_of_the_configuration_once() -> None:
    found = flags(TrainCommand)
    assert len(found) == len(set(found))
    leaves = sum(
        not (is_dataclass(hint) and isinstance(hint, type))
        for kind in [Config, *(get_type_hints(Config).values())]
        if is_dataclass(kind)
        for name, hint in get_type_hints(kind).items()
        if (kind, name) != (FilterConfig, "response")  # a function is no flag
    )
    view = len(fields(get_type_hints(get_type_hints(Config)["augment"])["view1"]))
    plain = [flag for flag in flags(Config) if "no-" not in flag]
    assert len(plain) == leaves + 2 * view
