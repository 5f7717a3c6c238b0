"""rdm_fast.tools.report.measure against numpy's singular value decomposition."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rdm_fast.config import FilterConfig
from rdm_fast.data import load
from rdm_fast.errors import DataError, UserError
from rdm_fast.filters.loss import SpectralCosine
from rdm_fast.methods import Branches, build_method
from rdm_fast.spectrum import effective_rank
from rdm_fast.telemetry import SPECTRUM_KEYS
from rdm_fast.tools.report.measure import (
    Measurement,
    Spectra,
    _branches,
    _spectra,
    measure,
    recorded,
)
from rdm_fast.tools.report.read import read_run
from tests.runs import CPU, run, with_log
from tests.tiny import tiny
from tests.tools.report.made import make_run, spectrum_line

B, D = 12, 7


def rows(seed: int) -> torch.Tensor:
    """[B, D] float64 with singular values that fall by half."""
    generator = np.random.default_rng(seed)
    U, _ = np.linalg.qr(generator.normal(size=(B, D)))
    V, _ = np.linalg.qr(generator.normal(size=(D, D)))
    return torch.from_numpy(8 * U * 0.5 ** np.arange(D) @ V.T)


@pytest.mark.parametrize("location", ["online", "target"])
def test_spectra_are_those_of_the_outputs_strongest_first(location: str) -> None:
    """Views with known singular values s: an output filtered by s^sigma has s^(2 + 2 sigma) / B."""
    sigma = 1.0 if location == "online" else -0.5
    config = FilterConfig(location=location, sigma=sigma)  # type: ignore[arg-type]
    z = torch.stack([rows(0), rows(1)])
    method = SimpleNamespace(criterion=SpectralCosine(config))
    found = _spectra(method, iter([Branches(z, z.flip(0), z)]), 5)  # type: ignore[arg-type]

    s = 8 * 0.5 ** np.arange(D)
    plain, filtered = s**2 / B, (s * (s / s.max()) ** sigma) ** 2 / B
    expected = {"online": plain, "target": plain, "projection": plain} | {location: filtered}
    for branch, values in expected.items():
        got = getattr(found, branch)
        np.testing.assert_allclose(got / got.sum(), values / values.sum(), rtol=1e-9)
    np.testing.assert_allclose(found.s, s, rtol=1e-9)
    np.testing.assert_allclose(found.response / found.response[0], (s / s[0]) ** sigma, rtol=1e-9)
    assert found.step == 5


def test_spectra_are_means_over_batches() -> None:
    """The second batch is three times as large in every row: eigenvalues 1 and 9, mean 5."""
    z = torch.stack([rows(0), rows(1)])
    method = SimpleNamespace(criterion=SpectralCosine(FilterConfig()))
    batches = [Branches(z, z.flip(0), z), Branches(3 * z, 3 * z.flip(0), 3 * z)]
    found = _spectra(method, iter(batches), 5)  # type: ignore[arg-type]
    one = _spectra(method, iter(batches[:1]), 5)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.projection, 5 * one.projection, rtol=1e-9)


# ---- a real run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    run(path, with_log(tiny(epochs=1), save_every=4))
    return path


def measured(path: Path, images: int = 60) -> Measurement:
    return measure(read_run(path, "run"), CPU, data_root=None, images=images, spectra=True)


def test_measuring_changes_no_file_and_gives_the_same_twice(trained: Path) -> None:
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    first, second = measured(trained), measured(trained)
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before
    assert first.spectra is not None and second.spectra is not None
    np.testing.assert_array_equal(first.spectra.online, second.spectra.online)
    assert first.embeddings is not None and second.embeddings is not None
    np.testing.assert_array_equal(first.embeddings.rows, second.embeddings.rows)
    assert first.spectra.step == 4


def test_the_spectra_tell_the_effective_rank_that_training_logged(trained: Path) -> None:
    """Recorded to five digits; of the checkpoint, on other images, about the same."""
    logged = read_run(trained, "run").series("effective_rank/target").last
    (*_, last) = recorded(read_run(trained, "run"))
    assert last.step == 4
    assert float(effective_rank(torch.from_numpy(last.target))) == pytest.approx(logged, rel=1e-4)
    fresh = measured(trained, images=0).spectra
    assert fresh is not None
    assert float(effective_rank(torch.from_numpy(fresh.target))) == pytest.approx(logged, rel=0.2)


def test_a_checkpoints_spectra_are_taken_in_training_mode() -> None:
    """The projector ends in a batch norm without bias: rows of a whole batch sum to zero."""
    method = build_method(tiny())
    (first, *_) = _branches(method.eval(), tiny(), CPU)
    assert first.projection.shape == (2, 336, 24)
    assert first.projection.mean(dim=1).abs().max() < 1e-5


def test_embeddings_are_of_that_many_test_images_with_their_labels(trained: Path) -> None:
    found = measure(read_run(trained, "run"), CPU, data_root=None, images=60, spectra=False)
    assert found.spectra is None and found.embeddings is not None
    rows, labels = found.embeddings.rows, found.embeddings.labels
    assert labels is not None and len(rows) == len(labels) == 60
    every = load(tiny().data, "test").labels
    assert every is not None and len(found.embeddings.classes) == 10
    np.testing.assert_array_equal(labels, every[np.linspace(0, 396, 60).round().astype(int)])
    assert measured(trained, images=0).embeddings is None


# ---- what was recorded -----------------------------------------------------------------------


def test_a_run_without_records_has_none_and_damaged_ones_are_told(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"), "run")
    assert recorded(run) == []
    file = run.path / "spectrum.jsonl"
    file.write_text('{"keys": {}}\n' + spectrum_line(2) + '{"step": 3, "onl')
    assert [spectra.step for spectra in recorded(run)] == [2]
    assert np.isnan(recorded(run)[0].response[2])
    for damage in ({"online": "no"}, {"s": 3.0}, {"target": [[1.0], 2.0]}, {"response": []}):
        file.write_text(spectrum_line(2, **damage))
        with pytest.raises(DataError, match=r"spectrum.jsonl cannot be used"):
            recorded(run)


def test_a_record_of_a_batch_that_was_not_finite_is_left_out(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"), "run")
    lines = [spectrum_line(2), spectrum_line(4, projection=[None, None, None])]
    (run.path / "spectrum.jsonl").write_text("".join(lines))
    assert [spectra.step for spectra in recorded(run)] == [2]


def test_every_key_that_is_read_is_one_that_is_recorded() -> None:
    assert {field.name for field in fields(Spectra)} <= {*SPECTRUM_KEYS}


# ---- mistakes --------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sound checkpoint"):
        measured(make_run(tmp_path / "untrained"))
    lost = read_run(trained, "run")
    assert lost.config is not None
    lost.config = replace(lost.config, data=replace(lost.config.data, name="cifar10", root="gone"))
    with pytest.raises(UserError, match="gone"):
        measure(lost, CPU, data_root=None, images=0, spectra=True)
    lost.config = None
    with pytest.raises(UserError, match="without a configuration"):
        measure(lost, CPU, data_root=None, images=0, spectra=True)
