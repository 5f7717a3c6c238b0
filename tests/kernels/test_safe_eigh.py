"""rdm_kernels.safe_eigh against known spectra, torch.linalg.eigh in float64, finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rdm_kernels import safe_eigh
from rdm_kernels.safe_eigh import default_cutoff, has_fast_float64
from tests.kernels.common import DEVICE, randn, rotated

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float64).eps
SOLVES = pytest.mark.parametrize("solve", [torch.float64, torch.float32], ids=["64", "32"])


def with_eigenvalues(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """Symmetric [n, n] float64 with these eigenvalues and random eigenvectors."""
    A, _ = rotated(eigenvalues, seed)
    return (A + A.mT) / 2


def stack(seeds: int) -> Tensor:
    return torch.stack([with_eigenvalues(SPECTRA["simple"], seed) for seed in range(seeds)])


SPECTRA = {
    "simple": torch.tensor([-3.0, 0.5, 1.0, 2.0, 7.0]),
    "identity": torch.ones(5),
    "projector": torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]),
    "rank 1": torch.tensor([0.0, 0.0, 0.0, 0.0, 4.0]),
    "zero": torch.zeros(5),
    "clustered": 1 + 1e-9 * torch.arange(5),
    "wide": torch.logspace(-12, 0, 5),
}
SPECTRA = {name: values.double().to(DEVICE) for name, values in SPECTRA.items()}


@settings(max_examples=40)
@given(
    eigenvalues=st.lists(
        st.one_of(st.integers(-99, 99).map(lambda i: i / 99), st.sampled_from([1e-12, 1e-8])),
        min_size=1,
        max_size=12,
    ),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-100, 100),
)
def test_drawn_spectra_come_back(eigenvalues: list[float], seed: int, exponent: int) -> None:
    """The solver is backward stable: n eps max |lambda|, and as much again from building A."""
    scale = 10.0**exponent
    expected = torch.tensor(eigenvalues, dtype=torch.float64, device=DEVICE).sort().values
    A = with_eigenvalues(expected, seed) * scale
    found = safe_eigh(A)
    n, largest = len(expected), expected.abs().max()
    unit = largest.where(largest > 0, 1) * scale
    bound = 4 * n * EPS
    assert (found.eigenvalues.diff() >= 0).all()
    assert_close(found.eigenvalues / unit, expected * (scale / unit), atol=bound, rtol=0)
    V = found.vectors
    assert_close(V.mT @ V, torch.eye(n).to(V), atol=bound, rtol=0)
    rebuilt = V * (found.eigenvalues / unit) @ V.mT
    assert_close(rebuilt, A / unit, atol=bound, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_every_dtype_equals_float64_of_the_same_matrix(name: str, dtype: torch.dtype) -> None:
    A = with_eigenvalues(SPECTRA[name]).to(dtype)
    wide = A.double()
    expected = torch.linalg.eigvalsh((wide + wide.mT) / 2)
    found = safe_eigh(A)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.eigenvalues.dtype == found.vectors.dtype == out and bool(found.finite)
    rounding = EPS * 10 + torch.finfo(out).eps / 2 * (out == torch.float32)
    unit = expected.abs().max().clamp_min(1e-30)
    assert_close(found.eigenvalues.double() / unit, expected / unit, atol=rounding, rtol=0)
    rebuilt = found.vectors.double() * found.eigenvalues.double() @ found.vectors.double().mT
    assert (rebuilt - wide).norm() <= 10 * rounding * unit


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@SOLVES
def test_autocast_changes_no_bit(autocast: torch.dtype, solve: torch.dtype) -> None:
    A = with_eigenvalues(torch.linspace(1, 2, 9).double()).float()
    results = []
    for enabled in (False, True):
        leaf = A.clone().requires_grad_()
        with torch.autocast(DEVICE.type, dtype=autocast, enabled=enabled):
            found = safe_eigh(leaf, solve=solve)
            (grad,) = torch.autograd.grad(found.vectors[0].sum() + found.eigenvalues[0], leaf)
        results.append((found.eigenvalues, found.vectors, grad))
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype and torch.equal(plain, cast)


@SOLVES
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100, 2.0**-1000, 2.0**900])
def test_a_power_of_two_scales_eigenvalues_alone(scale: float, solve: torch.dtype) -> None:
    A = with_eigenvalues(SPECTRA["wide"])
    plain, scaled = safe_eigh(A, solve=solve), safe_eigh(A * scale, solve=solve)
    assert torch.equal(scaled.vectors, plain.vectors)
    assert torch.equal(scaled.eigenvalues, plain.eigenvalues * scale)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_entries_of_extreme_scale_neither_vanish_nor_overflow(scale: float) -> None:
    expected = torch.tensor([1.0, 2.0, 3.0], device=DEVICE).double() * scale
    found = safe_eigh(with_eigenvalues(expected).float())
    assert_close(found.eigenvalues.double() / scale, expected / scale, atol=1e-6, rtol=0)
    assert int(found.rank) == 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 4), (4, 0), (2, 2)], ids=["upper", "lower", "diagonal"])
def test_a_matrix_that_is_not_finite_harms_no_other(bad: float, place: tuple[int, int]) -> None:
    dirty = stack(3)
    clean = safe_eigh(dirty)
    dirty[1, *place] = bad
    dirty.requires_grad_()
    found = safe_eigh(dirty)
    assert found.finite.tolist() == [True, False, True] and found.rank.tolist() == [5, 0, 5]
    assert found.eigenvalues[1].isnan().all()
    assert torch.equal(found.vectors[1], torch.eye(5).to(dirty))
    for i in (0, 2):
        assert torch.equal(found.eigenvalues[i], clean.eigenvalues[i])
        assert torch.equal(found.vectors[i], clean.vectors[i])
    (grad,) = torch.autograd.grad(found.eigenvalues.sum() + found.vectors.sum(), dirty)
    assert grad.isfinite().all() and not grad[1].any() and grad[0].any()


def test_a_solver_that_does_not_converge_flags_its_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the solver does, the whole call raises when one matrix of the batch fails."""
    batch = stack(4).reshape(2, 2, 5, 5)
    clean, solver, bad = safe_eigh(batch), torch.linalg.eigh, batch[1, 0]
    given = bad / 2.0 ** int(torch.frexp(bad.abs().max()).exponent)  # as the solver gets it

    def failing(A: Tensor) -> tuple[Tensor, Tensor]:
        if any(torch.equal(matrix, given) for matrix in A.reshape(-1, 5, 5)):
            raise torch.linalg.LinAlgError("failed to converge")
        return solver(A)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found = safe_eigh(batch)
    assert found.finite.tolist() == [[True, True], [False, True]]
    # Solved one by one now, which some processors round differently.
    assert_close(
        found.eigenvalues[found.finite], clean.eigenvalues[found.finite], atol=1e-13, rtol=0
    )
    assert torch.equal(found.vectors[1, 0], torch.eye(5).to(batch))


@SOLVES
def test_rank_counts_eigenvalues_of_either_sign_above_the_cutoff(solve: torch.dtype) -> None:
    eigenvalues = torch.tensor([-1e-2, -1e-4, 0, 1e-4, 1e-2, 1]).double()
    A = with_eigenvalues(eigenvalues)
    assert int(safe_eigh(A, cutoff=1e-3, solve=solve).rank) == 3
    assert int(safe_eigh(A, cutoff=1e-5, solve=solve).rank) == 5
    assert int(safe_eigh(A, cutoff=1e-3, non_negative=True, solve=solve).rank) == 2
    assert int(safe_eigh(torch.zeros(4, 4)).rank) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [3, 40])
def test_rounding_of_the_entries_never_adds_to_the_rank(n: int, dtype: torch.dtype) -> None:
    """The default cutoff bounds |E|_2 for a relative error of u in each entry."""
    for seed in range(5):
        eigenvalues = torch.zeros(n, dtype=torch.float64)
        eigenvalues[-2:] = torch.tensor([0.9, 1.0])
        A = with_eigenvalues(eigenvalues, seed).to(dtype)
        assert int(safe_eigh(A).rank) == 2
    assert default_cutoff(A, narrow=False) < 0.05


def test_non_negative_turns_negative_rounding_into_zero() -> None:
    A = with_eigenvalues(SPECTRA["rank 1"])
    assert (safe_eigh(A).eigenvalues < 0).any()
    assert (safe_eigh(A, non_negative=True).eigenvalues >= 0).all()


def test_rayleigh_quotients_give_a_float32_solve_the_square_of_its_accuracy() -> None:
    """eps^2 / gap: the error of the vectors, eps / gap, squared, times the gap.

    At eigenvalues of 1e-6, singular values of 1e-3, float32's own errors are some per cent.
    """
    expected = torch.logspace(-6, 0, 10, dtype=torch.float64, device=DEVICE)
    A = torch.stack([with_eigenvalues(expected, seed) for seed in range(5)])
    found = safe_eigh(A, solve=torch.float32)
    refined = ((found.eigenvalues - expected) / expected).abs().max()
    plain = ((torch.linalg.eigvalsh(A.float()) - expected) / expected).abs().max()
    assert refined < 2e-3 and plain > 20 * refined
    assert (found.eigenvalues.diff() >= 0).all()
    norms = found.vectors.norm(dim=-2)
    assert_close(norms, torch.ones_like(norms), atol=4 * EPS, rtol=0)


@SOLVES
def test_the_largest_components_are_positive_and_noise_flips_no_sign(solve: torch.dtype) -> None:
    A = with_eigenvalues(torch.linspace(1, 5, 6).double())
    V = safe_eigh(A, solve=solve).vectors
    largest = V.gather(0, V.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()
    noise = randn(6, 6, dtype=torch.float64)
    again = safe_eigh(A + 1e-10 * (noise + noise.mT), solve=solve).vectors
    assert_close(again, V, atol=1e-6, rtol=0)


def test_equally_large_components_are_decided_by_the_first() -> None:
    """[1, -1] / sqrt 2, up to rounding that makes the second the larger one."""
    for tilt in (-1e-9, 0.0, 1e-9):
        A = torch.tensor([[1 + tilt, -1], [-1, 1 - tilt]], dtype=torch.float64, device=DEVICE)
        V = safe_eigh(A).vectors
        assert (V[0] > 0).all()


def test_only_the_symmetric_part_counts() -> None:
    A = randn(5, 5, dtype=torch.float64)
    mine, half = safe_eigh(A), safe_eigh((A + A.mT) / 2)
    assert torch.equal(mine.eigenvalues, half.eigenvalues)
    assert torch.equal(mine.vectors, half.vectors)


def test_gradients_equal_finite_differences_on_simple_eigenvalues() -> None:
    A = stack(2).requires_grad_()
    torch.autograd.gradcheck(lambda a: tuple(safe_eigh(a))[:2], A)

    def rebuilt(a: Tensor) -> Tensor:
        found = safe_eigh(a)
        return found.vectors * found.eigenvalues[..., None, :] @ found.vectors.mT

    torch.autograd.gradcheck(rebuilt, A)  # through both at once


@pytest.mark.parametrize("name", ["identity", "projector", "rank 1", "zero", "clustered"])
def test_gradients_are_finite_on_repeated_eigenvalues(name: str) -> None:
    A = with_eigenvalues(SPECTRA[name]).requires_grad_()
    found = safe_eigh(A)
    weight = torch.randn_like(found.vectors)
    (grad,) = torch.autograd.grad((weight * found.vectors).sum() + found.eigenvalues.sum(), A)
    assert grad.isfinite().all()
    unit = 1 / (EPS * 5)  # the largest 1 / gap that counts
    assert grad.abs().max() <= unit * weight.norm() / SPECTRA[name].max().clamp_min(1)


def test_a_projector_on_a_repeated_eigenvalue_has_its_exact_gradient() -> None:
    """Onto the three eigenvalues of 1; torch's own gradient of eigh is not finite here."""
    A = torch.block_diag(torch.zeros(2, 2), torch.eye(3)).double().to(DEVICE).requires_grad_()

    def projector(a: Tensor) -> Tensor:
        V = safe_eigh(a).vectors[:, 2:]
        return V @ V.mT

    torch.autograd.gradcheck(projector, A)
    _, V = torch.linalg.eigh(A)
    (theirs,) = torch.autograd.grad((randn(5, 5).double() * V).sum(), A)
    assert not theirs.isfinite().all()


def test_compiled_is_the_same() -> None:
    A = with_eigenvalues(SPECTRA["simple"])
    eager = safe_eigh(A)
    compiled = torch.compile(safe_eigh, backend="aot_eager", fullgraph=True)(A)
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)


def test_strided_input_and_leading_dimensions_are_read_as_they_look() -> None:
    A = stack(6)
    strided = A.permute(1, 2, 0).contiguous().permute(2, 0, 1).reshape(2, 3, 5, 5)
    for found, flat in zip(safe_eigh(strided)[:2], safe_eigh(A)[:2], strict=True):
        assert torch.equal(found.flatten(0, 1), flat)


@pytest.mark.parametrize(
    ("capability", "fast"), [((9, 0), True), ((10, 0), True), ((8, 6), False), ((12, 0), False)]
)
def test_float64_is_fast_on_data_center_gpus_only(
    capability: tuple[int, int], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_fast_float64(torch.device("cuda", 0)) == fast
    assert has_fast_float64(torch.device("cpu"))
