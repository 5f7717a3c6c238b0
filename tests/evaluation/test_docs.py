"""docs/evaluation.md: its commands are understood, and its tables are complete."""

import re
import shlex
from pathlib import Path

import pytest

from rdm_fast.command_line import parse_evaluate, parse_export, parse_train
from rdm_fast.evaluation.protocols import PROTOCOLS
from rdm_fast.export.targets import TARGETS
from rdm_fast.foreign import LAYOUTS

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (.*(?:eval_linear\.py|train\.py|rdm export) .*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line: str) -> None:
    words = shlex.split(line, comments=True)
    if "export" in words:
        parse_export(words[words.index("export") + 1 :])
        return
    script = next(word for word in words if word.endswith(".py"))
    parse = {"eval_linear.py": parse_evaluate, "train.py": parse_train}[script]
    command = parse(words[words.index(script) + 1 :])
    if script == "eval_linear.py":
        command.protocol_for("cifar10")  # type: ignore[attr-defined]


def test_the_page_has_commands_and_names_all_there_is() -> None:
    assert len(COMMANDS) >= 12
    for name in (*PROTOCOLS, *TARGETS):
        assert f"`{name}`" in PAGE, name
    for layout in LAYOUTS.values():
        assert not layout.prefix or layout.prefix == "module." or layout.prefix in PAGE, layout
