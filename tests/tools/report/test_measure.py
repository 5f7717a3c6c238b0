"""rdm_fast.tools.report.measure against numpy's singular value decomposition."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rdm_fast.config import AugmentConfig, DataConfig, FilterConfig
from rdm_fast.data import load
from rdm_fast.errors import DataError, UserError
from rdm_fast.filters.loss import SpectralCosine
from rdm_fast.methods import Branches, Method, build_method
from rdm_fast.spectrum import effective_rank
from rdm_fast.telemetry import SPECTRUM_KEYS
from rdm_fast.tools.report.measure import (
    Embeddings,
    Spectra,
    _branches,
    _spectra,
    measure,
    recorded,
)
from rdm_fast.tools.report.read import read_run
from tests.data.files import DAMAGED, good_images, put
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


def filtered_by(config: FilterConfig) -> Method:
    method = build_method(tiny())
    method.criterion = SpectralCosine(config)
    return method


@pytest.mark.parametrize("location", ["online", "target"])
def test_spectra_are_those_of_the_outputs_strongest_first(location: str) -> None:
    """Views with known singular values s: an output filtered by s^sigma has s^(2 + 2 sigma) / B."""
    sigma = 1.0 if location == "online" else -0.5
    config = FilterConfig(location=location, sigma=sigma)  # type: ignore[arg-type]
    z = torch.stack([rows(0), rows(1)])
    found = _spectra(filtered_by(config), iter([Branches(z, z.flip(0), z)]), 5)

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
    method = filtered_by(FilterConfig())
    batches = [Branches(z, z.flip(0), z), Branches(3 * z, 3 * z.flip(0), 3 * z)]
    found = _spectra(method, iter(batches), 5)
    one = _spectra(method, iter(batches[:1]), 5)
    np.testing.assert_allclose(found.projection, 5 * one.projection, rtol=1e-9)


# ---- a real run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    run(path, with_log(tiny(epochs=1), save_every=4))
    return path


def measured(
    path: Path, images: int = 60, spectra: bool = True
) -> tuple[Spectra | None, Embeddings | None]:
    return measure(read_run(path, "run"), CPU, data_root=None, images=images, spectra=spectra)


def test_measuring_changes_no_file_and_gives_the_same_again(trained: Path) -> None:
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    first, rows = measured(trained)
    second, no_rows = measured(trained, images=0)
    no_spectra, same_rows = measured(trained, spectra=False)
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before
    assert no_spectra is no_rows is None
    assert first is not None and second is not None and first.step == 4
    np.testing.assert_array_equal(first.online, second.online)
    # Batches in training mode, for spectra, do not change the backbone that embeds.
    assert rows is not None and same_rows is not None
    np.testing.assert_array_equal(rows.rows, same_rows.rows)
    every = load(tiny().data, "test").labels
    assert every is not None and rows.labels is not None and len(rows.classes) == 10
    chosen = np.linspace(0, 396, 60).round().astype(int)
    np.testing.assert_array_equal(rows.labels, every[chosen])

    # Recorded to five digits; of the checkpoint, on other images, about the same.
    logged = read_run(trained, "run").series("effective_rank/target").last
    (*_, last) = recorded(read_run(trained, "run"))
    assert last.step == 4
    assert float(effective_rank(torch.from_numpy(last.target))) == pytest.approx(logged, rel=1e-4)
    fresh = float(effective_rank(torch.from_numpy(first.target)))
    assert fresh == pytest.approx(logged, rel=0.2)


def test_a_checkpoints_spectra_are_taken_in_training_mode() -> None:
    """The projector ends in a batch norm without bias: rows of a whole batch sum to zero."""
    method = build_method(tiny())
    (first, *_) = _branches(method.eval(), tiny(), CPU)
    assert first.projection.shape == (2, 336, 24)
    assert first.projection.mean(dim=1).abs().max() < 1e-5


# ---- recorded spectra --------------------------------------------------------------------------


def test_damaged_and_non_finite_records_are_skipped_or_an_error(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"), "run")
    assert recorded(run) == []
    file = run.path / "spectrum.jsonl"
    nan = spectrum_line(4, projection=[None, None, None])
    file.write_text('{"keys": {}}\n' + spectrum_line(2) + nan + '{"step": 3, "onl')
    assert [spectra.step for spectra in recorded(run)] == [2]
    assert np.isnan(recorded(run)[0].response[2])
    for damage in ({"online": "no"}, {"s": 3.0}, {"target": [[1.0], 2.0]}, {"response": []}):
        file.write_text(spectrum_line(2, **damage))
        with pytest.raises(DataError):
            recorded(run)


def test_every_key_that_is_read_is_recorded() -> None:
    assert {field.name for field in fields(Spectra)} <= {*SPECTRUM_KEYS}


def test_a_run_that_cannot_be_measured_is_an_error(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        measured(make_run(tmp_path / "untrained"))
    lost = read_run(trained, "run")
    assert lost.config is not None
    gone = replace(lost.config, data=replace(lost.config.data, name="cifar10", root="gone"))
    for config in (gone, None):
        lost.config = config
        with pytest.raises(UserError):
            measure(lost, CPU, data_root=None, images=0, spectra=True)


def test_a_report_needs_no_usable_test_set_and_leaves_out_bad_images(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = good_images(tmp_path / "data")
    (root / "val").mkdir()
    put(root / "train/a/0.jpg", DAMAGED["data.jpg"])
    data = DataConfig(name="folder", root=str(root), loader="torch", workers=0)
    config = replace(tiny("digits_simsiam", epochs=1, global_batch=4), data=data)
    config = replace(config, augment=AugmentConfig(size=16))
    run(tmp_path / "run", config)
    capfd.readouterr()
    _, found = measured(tmp_path / "run", spectra=False)
    assert found is not None and len(found.rows) == 7
    assert found.labels is not None and found.labels.tolist() == [0] * 3 + [1] * 4
    assert capfd.readouterr().out.count("warning: embeddings of training images: ") == 1
