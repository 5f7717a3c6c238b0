"""Whether DALI is installed, for tests that need it: without it they are skipped, and say so."""

import sys
from importlib.util import find_spec

import pytest

from rdm_fast.data.loaders.dali_loader import install_line

HERE = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HERE, reason=f"needs NVIDIA DALI: {install_line()}")
LOADERS = ["resident", "torch", pytest.param("dali", marks=needs_dali)]
DECODING = ["torch", pytest.param("dali", marks=needs_dali)]
"""Loaders that decode images one by one."""


def without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if DALI were not installed."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "rdm_fast.data.loaders.dali_graph", raising=False)
    monkeypatch.delattr("rdm_fast.data.loaders.dali_graph", raising=False)
