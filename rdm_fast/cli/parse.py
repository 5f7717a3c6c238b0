"""Reads a command line with tyro. Every error is one line that names the flag and the fix.

tyro's error events are private (`tyro._errors`), so pyproject.toml pins its version.
"""

import contextlib
import io
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro import _errors

from rdm_fast.config.checks import did_you_mean, shown
from rdm_fast.config.flags import Alias, Shape
from rdm_fast.config.recipes import DEFAULT, RECIPES, recipe
from rdm_fast.errors import UsageError

Options = TypeVar("Options")
HELP = "--help lists all"
FLAG = "--?[A-Za-z]"  # and no negative number
KINDS = {
    "INT": "a whole number", "FLOAT": "a number", "FLOAT FLOAT": "two numbers",
    "[FLOAT [FLOAT ...]]": "numbers",
}  # fmt: skip
"""What tyro's placeholders stand for."""


@dataclass(frozen=True)
class Command:
    """One command of `rdm`."""

    options: type
    about: str
    """What it does, for --help."""
    run: Callable[[Any, list[str]], None]
    """Called with the options and the arguments they were parsed from."""

    def parse(self, args: Sequence[str], prog: str = "rdm") -> Any:
        """The command's options. Raises as `parse` below."""
        return parse(self.options, args, prog, self.about)


def parse(options: type[Options], args: Sequence[str], prog: str = "", about: str = "") -> Options:
    """The options that command-line arguments give.

    Args:
        options: a dataclass; its fields are the flags, the string under a field is its help. If it
            has a field `config`, the first argument may name the recipe that the flags change.
        args: the arguments after the command's name.
        prog: the command, for its help.
        about: what it does, for its help.

    Raises:
        UsageError: an unknown recipe or flag, a bad value, or an impossible combination.
        SystemExit: `args` ask for help, which is printed.
    """
    args, default = [_at_home(arg) for arg in args], tyro.MISSING_NONPROP
    if "config" in options.__annotations__:
        name = args.pop(0) if args and not args[0].startswith("-") else DEFAULT
        known = getattr(options, "recipes", RECIPES)
        if name not in known:
            raise UsageError(f"unknown recipe {name}: {did_you_mean(name, known, HELP)}")
        start: Any = getattr(options, "from_recipe", lambda name: options(config=recipe(name)))  # type: ignore[call-arg]
        default = start(name)
        prog += " [RECIPE]"
        recipes = "\n".join(f"  {key}: {make.__doc__}" for key, make in RECIPES.items())
        about += f"\n\nRECIPE is {name} here, one of:\n{recipes}"
    _tell_tyro(options)
    rejected: list[_errors.ParseErrorEvent] = []
    try:
        with _errors.on_parse_error(rejected.append), contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(options, args=args, prog=prog, description=about, default=default)
    except SystemExit:
        if not rejected:
            raise
    raise UsageError(_message(rejected[0], args, options))


def _tell_tyro(options: type) -> None:
    """Replace every `Alias` and `Shape` in a dataclass's annotations, and in those of its tables,
    by what tyro understands."""
    for name, hint in get_type_hints(options, include_extras=True).items():
        plain, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if is_dataclass(plain) and isinstance(plain, type):
            _tell_tyro(plain)
        known = [_for_tyro(note) for note in notes]
        if known != notes:
            options.__annotations__[name] = Annotated[plain, *known]


def _for_tyro(note: Any) -> Any:
    match note:
        case Alias(flag):
            return tyro.conf.arg(aliases=[flag])
        case Shape.POSITIONAL:
            return tyro.conf.Positional
        case Shape.HIDDEN:
            return tyro.conf.Suppress
    return note


def _at_home(arg: str) -> str:
    """An argument with ~ expanded where it begins a value, as a shell does not after `--flag=`."""
    flag, equals, value = arg.rpartition("=") if arg.startswith("-") else ("", "", arg)
    return flag + equals + os.path.expanduser(value)


def flags(options: type) -> set[str]:
    """Every flag that a command's help lists."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        parse(options, ["--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", shown.getvalue()))


def _message(event: _errors.ParseErrorEvent, args: Sequence[str], options: type) -> str:
    """One sentence for what tyro rejects."""
    match event:
        case _errors.InvalidChoice(argument=argument, value=value, choices=choices):
            return f"{argument.display_name()} cannot be {value}: use one of {', '.join(choices)}"
        case _errors.InstantiationFailure(argument=argument, message=message):
            if argument is None:  # a check of the options' own
                return message
            return _takes(argument, args)
    known = flags(options)
    for arg in args:
        flag = arg.partition("=")[0].replace("_", "-")
        if re.match(FLAG, flag) and flag not in known:
            return f"unknown flag {flag}: {did_you_mean(flag, known, HELP)}"
    match event:
        case _errors.BadValue(argument=argument):
            return _takes(argument, args)
        case _errors.MissingArgs(missing_arguments=[first, *_]):
            return f"no {first.arg.display_name()} given: --help says what it is"
        case _errors.UnrecognizedArgs(tokens=[token, *_]):
            end = args.index(token) if token in args else 0
            before = [arg for arg in args[:end] if re.match(FLAG, arg)]
            after = f" after {before[-1].partition('=')[0]}" if before else ""
            return f"unexpected argument {shown(token)}{after}: leave it out ({HELP})"
    return f"the arguments contradict each other ({HELP})"


def _takes(argument: Any, args: Sequence[str]) -> str:
    """What a flag takes, and what it was given."""
    lowered, given = argument.lowered, []
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag.replace("_", "-") in lowered.name_or_flags:
            after = itertools.takewhile(lambda word: not re.match(FLAG, word), args[i + 1 :])
            given = [value] if equals else [*after]
    kind = KINDS.get(str(lowered.metavar), "a value")
    found = shown(" ".join(given)) if given else "none"
    return f"{argument.display_name()} takes {kind}, not {found}"


LAUNCHING = ("--nproc", "--max-restarts")
"""Flags with a value that only the process that starts ranks takes."""


def for_ranks(args: Sequence[str]) -> list[str]:
    """The arguments without LAUNCHING and their values, as each rank gets them."""
    written = [arg.partition("=")[0].replace("_", "-") for arg in args]
    return [
        arg
        for before, flag, arg in zip(["", *args], written, args, strict=False)
        if before.replace("_", "-") not in LAUNCHING and flag not in LAUNCHING
    ]
