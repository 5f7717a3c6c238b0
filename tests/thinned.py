"""Walks over combinations of parameters that are too many for `make test`."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def in_turn(n: int, *axes: Sequence[Any]) -> list[Any]:
    """Every combination of values, but slow for all but one of each combination of the first n.

    That one takes the combinations of the other axes in turn.
    """
    found, others = [], list(product(*axes[n:]))
    for at in product(*(range(len(axis)) for axis in axes[:n])):
        first = [axis[i] for axis, i in zip(axes, at, strict=False)]
        for i, values in enumerate(others):
            chosen = i == sum(at) % len(others)
            marks = [] if chosen else [pytest.mark.slow]
            found.append(pytest.param(*first, *values, marks=marks))
    return found
