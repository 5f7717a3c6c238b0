"""The default method under torchrun: 2 and 4 ranks end where one rank does."""

from pathlib import Path

import pytest

from tests import runs
from tests.processes import Run
from tests.tiny import tiny


@pytest.fixture(scope="module")
def band(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """What rounding may make of the losses of one rank: see `runs.rounding_band`."""
    return runs.rounding_band(tmp_path_factory.mktemp("band"), runs.with_log(tiny(), every=1))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_end_with_the_loss_of_one_rank_at_the_same_global_batch(
    world: int, band: list[tuple[float, float]], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", epochs=2, world=world, flags="--log.every 1")
    run.finish()
    assert runs.outside(runs.losses(tmp_path / "run"), band) == []
