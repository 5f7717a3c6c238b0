"""Results as lines of JSON, each on disk the moment it exists; a plugin that writes those of tests.

    python -m pytest -p bench.rows --rows=FILE ...

With RDM_BENCH_SMALL in the environment every benchmark has its smallest form, and of each file of
tests only the first runs.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

SMALL = "RDM_BENCH_SMALL" in os.environ
TESTS = Path(__file__).resolve().parents[1] / "tests"
LINES = 12  # of an error, to keep


def append(path: Path | None, row: Mapping[str, Any]) -> None:
    """Add a row to a file, if there is one to write."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, help="append each result to this file, a JSON line each")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("rows")
    if path and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to this process
        config.pluginmanager.register(Outcomes(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SMALL:
        first = {item.path: item for item in reversed(items)}
        kept = [i for i in items if not i.path.is_relative_to(TESTS) or first[i.path] is i]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


class Outcomes:
    """Writes a row for every test that has ended, with the last lines of its error."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._write(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report, 0.0)

    def _write(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        lines = [] if report.passed else report.longreprtext.splitlines()[-LINES:]
        append(
            self.path,
            {
                "test": report.nodeid,
                "outcome": report.outcome,
                "seconds": round(seconds, 3),
                "error": "\n".join(lines),
            },
        )
