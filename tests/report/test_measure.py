"""rdm_fast.report.measure against numpy's singular value decomposition."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rdm_fast.config import FilterConfig
from rdm_fast.errors import UserError
from rdm_fast.methods import Branches
from rdm_fast.report.measure import Measurement, _spectra, measure, measured_response
from rdm_fast.report.read import read_run
from rdm_fast.spectrum import effective_rank
from tests.report.made import make_run
from tests.runs import CPU, run, with_log
from tests.tiny import tiny

B, D = 12, 7


def rows(seed: int) -> torch.Tensor:
    """[B, D] float64 with singular values that fall by half."""
    generator = np.random.default_rng(seed)
    U, _ = np.linalg.qr(generator.normal(size=(B, D)))
    V, _ = np.linalg.qr(generator.normal(size=(D, D)))
    return torch.from_numpy(8 * U * 0.5 ** np.arange(D) @ V.T)


def test_the_response_of_a_linear_predictor_along_its_own_directions_is_its_gain() -> None:
    z = rows(0)
    _, s, Vt = torch.linalg.svd(z, full_matrices=False)
    gains = torch.arange(1, D + 1, dtype=torch.float64)
    found_s, found_g = measured_response(z, z @ Vt.T @ torch.diag(gains) @ Vt)
    torch.testing.assert_close(found_s.flip(0), s, rtol=1e-10, atol=0)
    torch.testing.assert_close(found_g.flip(0), gains, rtol=1e-10, atol=0)


def test_a_direction_of_noise_has_no_response() -> None:
    z = rows(0)
    z[:, -1] = z[:, 0]  # one singular value is zero
    _, g = measured_response(z, z)
    assert g[0].isnan()
    torch.testing.assert_close(g[1:], torch.ones(D - 1, dtype=torch.float64))


@pytest.mark.parametrize("location", ["online", "target"])
def test_spectra_are_those_of_the_outputs_strongest_first(location: str) -> None:
    """Views with known singular values s: an output filtered by s^sigma has s^(2 + 2 sigma) / B."""
    sigma = 1.0 if location == "online" else -0.5
    config = FilterConfig(location=location, sigma=sigma)  # type: ignore[arg-type]
    z = torch.stack([rows(0), rows(1)])
    method = SimpleNamespace(filter=config)
    found = _spectra(method, Branches(z, z.flip(0), z))  # type: ignore[arg-type]

    s = 8 * 0.5 ** np.arange(D)
    plain, filtered = s**2 / B, (s * (s / s.max()) ** sigma) ** 2 / B
    expected = {"online": plain, "target": plain, "projection": plain} | {location: filtered}
    for branch, values in expected.items():
        got = getattr(found, branch)
        np.testing.assert_allclose(got / got.sum(), values / values.sum(), rtol=1e-9)
    np.testing.assert_allclose(found.strength, s, rtol=1e-9)
    np.testing.assert_allclose(found.response / found.response[0], (s / s[0]) ** sigma, rtol=1e-9)
    assert found.batch == B


# ---- a real run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    run(path, with_log(tiny(epochs=1), save_every=4))
    return path


def measured(path: Path, images: int = 60) -> Measurement:
    return measure(read_run(path, "run"), CPU, data_root=None, images=images)


def test_measuring_changes_no_file_and_gives_the_same_twice(trained: Path) -> None:
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    first, second = measured(trained), measured(trained)
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before
    np.testing.assert_array_equal(first.spectra.online, second.spectra.online)
    assert first.embeddings is not None and second.embeddings is not None
    np.testing.assert_array_equal(first.embeddings.rows, second.embeddings.rows)
    assert first.step == 4 and first.spectra.batch == 336


def test_the_spectra_tell_the_effective_rank_that_training_logged(trained: Path) -> None:
    """Training views of the last step's weights: other images, so only about the same."""
    spectra = measured(trained, images=0).spectra
    logged = read_run(trained, "run").series("effective_rank/target").last
    assert float(effective_rank(torch.from_numpy(spectra.target))) == pytest.approx(logged, rel=0.2)


def test_embeddings_are_of_that_many_test_images_with_their_labels(trained: Path) -> None:
    found = measured(trained).embeddings
    assert found is not None and found.labels is not None
    assert len(found.rows) == len(found.labels) == 60
    assert {*found.labels.tolist()} == {*range(10)} and len(found.classes) == 10
    assert measured(trained, images=0).embeddings is None


def test_what_cannot_be_measured_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sound checkpoint"):
        measured(make_run(tmp_path / "untrained"))
    lost = read_run(trained, "run")
    assert lost.config is not None
    lost.config = replace(lost.config, data=replace(lost.config.data, name="cifar10", root="gone"))
    with pytest.raises(UserError, match="gone"):
        measure(lost, CPU, data_root=None, images=0)
    lost.config = None
    with pytest.raises(UserError, match="without a configuration"):
        measure(lost, CPU, data_root=None, images=0)
