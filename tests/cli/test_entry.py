"""The entry points: what is set before torch is imported."""

import os

import pytest

from rdm_fast import __main__ as entries
from rdm_fast.cli import commands


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, entries.SPINS),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
    ids=str,
)
def test_waiting_threads_sleep_soon_unless_the_environment_says_otherwise(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # is put back as it was
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = []

    def command() -> None:
        found.append(os.environ.get("GOMP_SPINCOUNT"))
        raise SystemExit

    monkeypatch.setattr(commands, "main", command)
    monkeypatch.setattr(entries, "guard_streams", lambda: None)
    monkeypatch.setattr(entries.signals, "catch", lambda: None)
    with pytest.raises(SystemExit):
        entries.main()
    assert found == [expected]
