"""`--fault-table FILE` writes what every file of this folder promises, and how many cases held."""

import importlib
import os
from collections import Counter
from pathlib import Path

import pytest

from bench.machine import describe
from bench.markdown import replace_between, table

COUNTS = {"RDM_FAULT_SIGNALS": "random signals", "RDM_FAULT_KILLS": "kills of random ranks"}
HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, help="Markdown file with a table to replace")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    path = config.getoption("--fault-table")
    of_one_worker = hasattr(config, "workerinput")  # which knows its own tests only
    if path is None or exitstatus or of_one_worker:
        return
    ended = {kind: terminalreporter.stats.get(kind, []) for kind in ("passed", "skipped")}
    counts = {kind: Counter(r.nodeid.split("::")[0] for r in rs) for kind, rs in ended.items()}
    rows = [
        [promise(file), f"`{file.name}`", *(str(count[_id(file)]) for count in counts.values())]
        for file in sorted(HERE.glob("test_*.py"))
    ]
    machine = describe()
    drawn = [f"{os.environ[name]} {what}" for name, what in COUNTS.items() if name in os.environ]
    where = [machine["device"], f"torch {machine['torch']}", str(machine["date"]), *drawn]
    text = table(["promise", "tests/faults/", "held", "skipped"], rows)
    replace_between(path, "faults", f"{text}\n\n{', '.join(map(str, where))}.")


def promise(file: Path) -> str:
    """The first paragraph of a test file, on one line."""
    module = importlib.import_module(f"tests.faults.{file.stem}")
    return " ".join((module.__doc__ or "").partition("\n\n")[0].split())


def _id(file: Path) -> str:
    return file.relative_to(HERE.parents[1]).as_posix()
