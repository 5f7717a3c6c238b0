"""From words to a dataclass of settings: flags, their short names, and mistakes in one line.

tyro turns a dataclass's fields into flags. Around it: short names that other trainers use, `_` and
`-` alike, and an unknown flag told with the nearest name.
"""

import contextlib
import difflib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import tyro

from rdm_fast.config import Config
from rdm_fast.errors import UsageError

Command = TypeVar("Command")

ALIASES = {
    "--pred-type": "--filter.kind",
    "--pred-location": "--filter.location",
    "--sigma": "--filter.sigma",
    "--arch": "--model.backbone",
    "--epochs": "--optim.epochs",
    "--batch-size": "--optim.global-batch",
    "--lr": "--optim.base-lr",
    "--wd": "--optim.weight-decay",
    "--momentum": "--optim.momentum",
    "--workers": "--data.workers",
    "--on-bad-image": "--data.on-bad-image",
    "--max-bad": "--data.max-bad",
    "--guard": "--guard.mode",
    "--init": "--model.init",
}
"""The paper's own flags, names that SimSiam, MoCo and torchvision share, and what is asked for when
a file is bad. Batch is global.

A command knows those of its own flags only."""


def nearest(word: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {found[0]}? (--help lists all)" if found else "--help lists all"


def flags(command: type, prefix: str = "--") -> list[str]:
    """Every flag of a command, as it is written on a command line."""
    names: list[str] = []
    for field in fields(command):
        positional = (tyro.conf.Positional[str], tyro.conf.Positional[tuple[str, ...]])
        if field.type in positional or not field.metadata.get("flag", True):
            continue
        kind = Config if field.name == "config" else field.type
        name = prefix + field.name.replace("_", "-")
        if is_dataclass(kind) and isinstance(kind, type):
            names += flags(kind, prefix if kind is Config else name + ".")
        else:
            names.append(name)
            if kind is bool:
                head, _, tail = name.rpartition(".")
                names.append(f"{head}.no-{tail}" if head else f"--no-{name[2:]}")
    return names


def normalize(argv: Sequence[str], command: type) -> list[str]:
    """Aliases replaced, `_` and `-` alike, unknown flags told with the nearest name.

    Raises:
        UsageError: a flag that no field has.
    """
    own = flags(command)
    aliases = {alias: flag for alias, flag in ALIASES.items() if flag in own}
    known = [*own, *aliases, "--help"]
    words: list[str] = []
    for word in argv:
        if re.match(r"--?[A-Za-z]", word):
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-")
            if flag not in (*known, "-h"):
                raise UsageError(f"unknown flag {flag}: {nearest(flag, known)}")
            word = aliases.get(flag, flag) + equals + value
        words.append(word)
    return words


PLAIN_WORDS = {
    r"^Error parsing config\.augment\.(view[12]): augment\.view\.": r"augment.\1.",
    r"^Error parsing \w[\w.]*: ": "",
    r"^Error parsing (\S+): invalid literal for int\(\) .*: ": r"\1 takes a whole number, not ",
    r"^Error parsing (\S+): could not convert string to float: ": r"\1 takes a number, not ",
    r"^Error parsing (\S+): Could not parse arguments (\[.*\]) .*": r"\1 takes numbers, not \2",
    r"^Missing value for argument '(\S+)'\. Expected 1 values\.": r"\1 needs a value",
    r"^Missing value for argument '(\S+)'\. Expected (\d+) values\.": r"\1 needs \2 values",
    r"^Missing from .*": "name a run folder, or a step folder inside its checkpoints",
    r"^invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*)\)\.": (
        r"\2 cannot be \1: use one of \3"
    ),
    r"^Unrecognized options: ": "a value too many: ",
}


def _message(printed: str) -> str:
    """The sentence inside tyro's box, which has a title above it and a rule below."""
    lines = [line.strip("│╭╮╰╯─- ") for line in printed.splitlines()]
    sentences = [line for line in lines if line][1:]
    message = sentences[0] if sentences else printed.strip()
    for pattern, replacement in PLAIN_WORDS.items():
        message = re.sub(pattern, replacement, message)
    return message


def parse(command: type[Command], argv: list[str], prog: str, **options: Any) -> Command:
    """tyro's result; its boxed errors become one UsageError.

    Raises:
        UsageError: a value of the wrong type, or a configuration that cannot be meant.
    """
    if "-h" in argv or "--help" in argv:
        hidden = (tyro.conf.SuppressFixed,)  # what only Python code can give
        return tyro.cli(command, args=["--help"], prog=prog, config=hidden, **options)
    printed = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"  # so that a message is one line
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(command, args=argv, prog=prog, **options)
    except SystemExit:
        raise UsageError(_message(printed.getvalue())) from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
