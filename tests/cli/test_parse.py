"""rdm_fast.cli: flags and their short names, one-line errors, and help."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_type_hints

import pytest

from rdm_fast.cli import commands as cli
from rdm_fast.cli.commands import COMMANDS
from rdm_fast.cli.options import TrainCommand
from rdm_fast.cli.parse import flags, for_ranks
from rdm_fast.config import Config
from rdm_fast.config.flags import Shape
from rdm_fast.config.recipes import DEFAULT, RECIPES, recipe
from rdm_fast.errors import UsageError
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.evaluation.protocols import PROTOCOLS
from rdm_fast.runtime.launcher import OF_A_RANK, STORE


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OF_A_RANK:
        monkeypatch.delenv(name, raising=False)


def parsed(line: str, name: str = "train") -> Any:
    return COMMANDS[name].parse(line.split())


def message(line: str, name: str = "train") -> str:
    """The one line that answers arguments which cannot be used."""
    with pytest.raises(UsageError) as caught:
        parsed(line, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def get(config: object, flag: str) -> object:
    """The value that a flag such as --optim.base-lr sets."""
    for name in flag.removeprefix("--").replace("-", "_").split("."):
        config = getattr(config, name)
    return config


# ---- accepted --------------------------------------------------------------------------------


def test_no_arguments_give_the_default_recipe() -> None:
    assert parsed("") == TrainCommand(config=recipe(DEFAULT))


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_argument_names_a_recipe_and_its_run_folder(name: str) -> None:
    assert parsed(name).config == replace(RECIPES[name](), out=f"runs/{name}")


def test_a_flag_changes_its_field_and_no_other() -> None:
    before = recipe("digits_byol")
    expected = replace(before, optim=replace(before.optim, epochs=7))
    assert parsed("digits_byol --optim.epochs 7").config == expected


@pytest.mark.parametrize(
    ("short", "flag", "value"),
    [
        ("--pred-type", "--filter.kind", "log_1"),
        ("--pred-location", "--filter.location", "online"),
        ("--sigma", "--filter.sigma", -0.7),
        ("--arch", "--model.backbone", "resnet34"),
        ("--epochs", "--optim.epochs", 5),
        ("--batch-size", "--optim.global-batch", 128),
        ("--lr", "--optim.base-lr", 0.3),
        ("--wd", "--optim.weight-decay", 1e-3),
        ("--momentum", "--optim.momentum", 0.8),
        ("--workers", "--data.workers", 3),
        ("--on-bad-image", "--data.on-bad-image", "stop"),
        ("--max-bad", "--data.max-bad", 0.2),
        ("--guard", "--guard.mode", "stop"),
        ("--init", "--model.init", "other_weights.pth"),
    ],
)
def test_a_short_name_sets_the_same_field_with_hyphens_and_underscores(
    short: str, flag: str, value: object
) -> None:
    assert get(recipe(DEFAULT), flag) != value
    for name in {
        short,
        flag,
        f"--{short[2:].replace('-', '_')}",
        f"--{flag[2:].replace('-', '_')}",
    }:
        assert get(parsed(f"{name} {value}").config, flag) == value
    assert get(parsed(f"{short}={value}").config, flag) == value


def test_switches_have_opposites_and_tuples_take_several_values() -> None:
    command = parsed(
        "--no-sync-bn --data.download --overwrite --augment.view2.crop-scale 0.3 0.9 "
        "--allow-change optim.epochs optim.base_lr"
    )
    assert command.config.sync_bn is False and command.config.data.download is True
    assert parsed("--data.no-download").config.data.download is False
    assert command.overwrite is True and command.debug is False
    assert command.config.augment.view2.crop_scale == (0.3, 0.9)
    assert command.config.augment.view1 == recipe(DEFAULT).augment.view1
    assert command.allow_change == ("optim.epochs", "optim.base_lr")


def test_the_last_of_two_equal_flags_counts() -> None:
    assert parsed("--seed 3 --optim.epochs 4 --seed 9").config.seed == 9


def test_evaluation_has_flags_of_its_own() -> None:
    found = parsed("runs/x --data_root d --batch 8 --seed 3 --device cpu --epochs 4", "eval")
    assert found == EvaluateCommand(
        checkpoint="runs/x", data_root="d", batch=8, seed=3, device="cpu", epochs=4
    )
    for protocol in PROTOCOLS:
        assert parsed(f"x --protocol {protocol}", "eval").protocol == protocol


def settings(kind: type, prefix: str = "--") -> Iterator[tuple[str, str, Any]]:
    """Long flag, name and type of every field, from the dataclasses alone."""
    hints = get_type_hints(kind)
    for name, marked in ((field.name, field.type) for field in fields(kind)):
        flag, hint = prefix + name.replace("_", "-"), hints[name]
        if Shape.HIDDEN in getattr(marked, "__metadata__", ()):
            continue
        if hint is Config:
            yield from settings(hint)
        elif is_dataclass(hint) and isinstance(hint, type):
            yield from settings(hint, f"{flag}.")
        else:
            yield flag, name, hint


NO_PATHS = ("arch", "backbone", "checkpoint", "nproc", "protocol")


def texts(kind: type) -> Iterator[str]:
    """The flag of every field that is a text; each may be a path."""
    for flag, name, hint in settings(kind):
        if hint in (str, str | None) and name not in NO_PATHS:
            yield flag


@pytest.mark.parametrize("name", COMMANDS)
def test_a_tilde_is_the_home_folder_in_every_flag(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/h")
    needed = {"eval": "~/x", "export": "~/x --to timm", "report": "~/x"}.get(name, "")
    special = {"--recipe": "", "--features-out": "/f.npz", "--data.classes": "", "--prefix": ""}
    special |= {"--data.image-column": "", "--data.label-column": ""}
    special |= {"--out": "/o.html"} if name == "report" else {}
    flags = [flag for flag in texts(COMMANDS[name].options) if special.get(flag) != ""]
    for line in (" ".join(f"{f}={{}}" for f in flags), " ".join(f"{f} {{}}" for f in flags)):
        filled = line.format(*(f"~{special.get(flag, '/a')}" for flag in flags))
        command = parsed(f"{needed} {filled}", name)
        for flag in flags:
            if flag != "--model.init-prefix":
                holder = command if hasattr(command, flag[2:].replace("-", "_")) else command.config
                assert get(holder, flag) == f"/h{special.get(flag, '/a')}"
        if needed:
            assert (getattr(command, "checkpoint", None) or command.runs[0]) == "/h/x"


# ---- rejected --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line", "named", "fix"),
    [
        ("train", "--optim.epoch 3", "--optim.epoch", "--optim.epochs?"),
        ("train", "--sigm", "--sigm", "--sigma?"),
        ("train", "--pred_typ log", "--pred-typ:", "--pred-type?"),
        ("train", "--pred_type log --sigm", "--sigm:", "--sigma?"),
        ("train", "--filter.cut-off=0.1", "--filter.cut-off", "--filter.cutoff?"),
        ("train", "--SEED 3", "--SEED", "--seed?"),
        ("train", "--overwite", "--overwite", "--overwrite?"),
        ("train", "--halp", "--halp", "--help?"),
        ("train", "--qqqqqqqqqq", "--qqqqqqqqqq", "--help"),
        ("train", "-x", "-x", "--help"),
        ("train", "--filter.response f", "--filter.response", "--filter"),
        ("train", "digit_byol", "digit_byol", "digits_byol?"),
        ("train", "qqqq", "qqqq", "--help"),
        ("train", "digits_byol 7", "7", "--help"),
        ("train", "--sync-bn false", "false", "--help"),
        ("train", "--optim.epochs three", "--optim.epochs", "whole number, not 'three'"),
        ("train", "--seed 1e3", "--seed", "whole number, not '1e3'"),
        ("train", "--lr x", "--optim.base-lr", "number, not 'x'"),
        ("train", "--augment.view1.crop-scale a 1", "--augment.view1.crop-scale", "two numbers"),
        ("train", "--augment.view1.crop-scale 0.5", "--augment.view1.crop-scale", "not '0.5'"),
        ("train", "--augment.view1.crop-scale -1 x", "--augment.view1.crop-scale", "not '-1 x'"),
        ("train", "--augment.view1.crop-scale 0 1 7", "'7'", "after --augment.view1.crop-scale"),
        ("train", "--augment.mean 0.1 a 1", "--augment.mean takes numbers", "not '0.1 a 1'"),
        ("train", "--augment.std=a", "--augment.std takes numbers", "not 'a'"),
        ("train", "--seed", "--seed", "whole number, not none"),
        ("train", "--data.loader --seed 3", "--data.loader", "a value, not none"),
        ("train", "--filter.kind pol", "--filter.kind", "poly, log, log_1"),
        ("train", "--device gpu", "--device", "auto, cpu, cuda"),
        ("train", "--augment.view2.jitter 2", "augment.view2.jitter=2.0", "0 to 1"),
        ("train", "--method byol --predictor none", "predictor=none", "predictor=mlp"),
        ("eval", "", "checkpoint", "--help"),
        ("eval", "--protocl y", "--protocl", "--protocol?"),
        ("eval", "x y", "y", "--help"),
        ("eval", "x --protocol closed", "protocol=closed", "closed-form"),
        ("eval", "x --batch 0", "--batch=0", "from 1 to"),
        ("eval", "x --device gpu", "--device", "cpu"),
        ("eval", "x --batch-size 3", "--batch-size", "--batch?"),
        ("eval", "--checkpoint x", "--checkpoint", "--help"),
        ("export", "x", "to", "--help"),
        ("doctor", "--batches 0", "--batches=0", "from 1 to"),
        ("preview", "--images 1", "--images=1", "from 2 to"),
        ("preview", "--imagess 3", "--imagess", "--images?"),
    ],
)
def test_an_error_names_the_flag_and_the_fix(name: str, line: str, named: str, fix: str) -> None:
    text = message(line, name)
    assert named in text and fix in text and "FLOAT" not in text and "INT" not in text


@pytest.mark.parametrize(
    "line",
    [
        "digits_byol --resume x",
        "--resume x --lr 0.1",
        "--resume x --optim.epochs=9",
        "--resume x --overwrite",
        "--resume x --allow-change optim.epochs",
        "--resume x --out y",
    ],
)
def test_resume_takes_no_other_configuration(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--overwrite beside --resume would delete the run that should continue."""
    with pytest.raises(SystemExit) as ended:
        cli.train(line.split())
    culprit = next(arg for arg in line.split() if arg not in ("--resume", "x")).partition("=")[0]
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"leave out {culprit}," in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        "--predictor=mlp",
        "--filter.sigma=2",
        "--pred_location=online",
        "digits_methods --method=byol",
    ],
)
def test_a_sweep_sets_what_it_varies(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", *line.split()])
    flag = line.split()[-1].partition("=")[0].replace("_", "-")
    assert ended.value.code == 2 and f"sets {flag} itself" in capsys.readouterr().err


# ---- ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["", "runs/a"], ids=["train", "eval"])
@pytest.mark.parametrize("nproc", ["0", "-1", "two", "1.5", "", "٣"])
def test_nproc_is_a_number_of_ranks_gpu_or_auto(nproc: str, line: str) -> None:
    name = "eval" if line else "train"
    with pytest.raises(UsageError) as caught:
        COMMANDS[name].parse([*line.split(), f"--nproc={nproc}"])
    assert "nproc=" in str(caught.value)
    for right in ("2", "gpu", "auto"):
        assert parsed(f"{line} --nproc {right}", name).nproc == right


@pytest.mark.parametrize("nproc", ["2", "gpu", "auto"])
def test_a_rank_starts_no_ranks(nproc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parsed("").nproc == "1"
    assert "--nproc" in message(f"--nproc {nproc}")
    assert "--nproc" in message(f"runs/a --nproc {nproc}", "eval")


def test_the_global_batch_divides_over_the_ranks_that_a_launcher_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.check_ranks(recipe(DEFAULT).optim, "gpu")  # the number of GPUs is not known yet
    for world, line in (("", "--batch-size 8 --nproc 3"), ("3", "--batch-size 200")):
        if world:
            for name, value in {"RANK": "0", "WORLD_SIZE": world, STORE: "meeting"}.items():
                monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            cli.train([*line.split(), "--print-config"])
        assert ended.value.code == 2 and "3 rank(s)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.train(["--batch-size", "201", "--print-config"])
    assert ended.value.code == 0
    for name in ("doctor", "sweep"):
        assert "torchrun" in message("", name)


def test_ranks_get_every_argument_but_those_of_their_launcher() -> None:
    args = ["digits_byol", "--nproc", "2", "--out", "--nproc-2", "--nproc=4", "--epochs=3"]
    args += ["--max-restarts", "3", "--max_restarts=2", "--max_restarts", "1"]
    assert for_ranks(args) == ["digits_byol", "--out", "--nproc-2", "--epochs=3"]


def test_only_a_launcher_of_ranks_restarts_them() -> None:
    assert parsed("--nproc 2 --max-restarts 3").max_restarts == 3
    for line in ("--max-restarts 3", "--nproc 2 --max-restarts -1"):
        assert "--max-restarts" in message(line)


# ---- help ------------------------------------------------------------------------------------


def leaves(kind: type) -> Iterator[str]:
    """The long flag of every field."""
    for flag, name, _ in settings(kind):
        if name not in ("checkpoint", "runs"):  # positional arguments
            yield flag


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_and_explains_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = COMMANDS[name].options
    assert set(leaves(options)) <= flags(options)
    with pytest.raises(SystemExit) as ended:
        parsed("--help", name)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for entry in re.split(r"^. (?=--[a-z])", shown, flags=re.MULTILINE)[1:]:
        help_text = re.split(r"\((?:default:|required)", re.sub(r"[\s│]+", " ", entry))[0]
        assert help_text.rstrip().endswith((".", ")")), entry
    listed = {"eval": PROTOCOLS, "export": ["torchvision"], "report": []}.get(name, RECIPES)
    assert not [word for word in listed if word not in shown]


def test_help_shows_the_values_of_the_named_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("cifar10_byol --help")
    shown = capsys.readouterr().out
    assert "RECIPE is cifar10_byol" in shown
    assert "(default: lars)" in shown and "(default: 400)" in shown


# ---- the rdm command -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        ([], 2, "usage: rdm {train,eval"),
        (["--help"], 0, "usage: rdm {train,eval"),
        (["trian"], 2, "error: unknown command trian: did you mean train?"),
        (["zzz"], 2, "error: unknown command zzz: use one of train, eval"),
        (["train", "--sigm"], 2, "error: unknown flag --sigm: did you mean --sigma?"),
        (["eval"], 2, "error: no checkpoint given"),
    ],
)
def test_rdm_runs_a_command_or_names_those_it_has(
    args: list[str], code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    out, err = capsys.readouterr()
    assert ended.value.code == code and (out + err).startswith(expected)


def test_debug_shows_the_traceback_before_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.train(["--debug", "--sigm"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("error: unknown flag --sigm")


def test_other_ranks_leave_the_error_to_rank_zero(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", STORE: "meeting"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        cli.train(["--nonsense"])
    assert ended.value.code == 2 and capsys.readouterr().err == ""
