"""rdm_kernels.filter_factors against the damped filter of an SVD, in float64."""

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_kernels import FilterFactors, filter_factors, product, sym_matmul
from rdm_kernels.filter_factors import QUINTICS, damping, lifted, residual_limit
from rdm_kernels.filter_steps import INACCURATE, NOT_FINITE
from rdm_kernels.sym_matmul import Symmetric
from tests import spectra
from tests.kernels.common import DEVICE
from tests.spectra import relative, spectrum
from tests.spies import Operators

CUTOFF = 1e-3
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log": torch.log,
    "log_1": torch.log1p,
    "log_2": lambda s: (s * s).log1p(),
}
POWERS = [1.0, 0.5, 0.0, -0.3, -0.5, 6.0]
ALL = pytest.mark.parametrize("g", [*POWERS, *FUNCTIONS])
SPECTRA = ["flat", "k^-1", "k^-2", "clusters", "rank 8"]
FIT = 5e-3  # largest error of a function of t, relative to its maximum; twice as much if it falls


def with_spectrum(*args: Any) -> Tensor:
    return spectra.with_spectrum(*args).to(DEVICE)


def factors(X: Tensor, g: float | str, **options: Any) -> FilterFactors:
    return filter_factors(X, g if isinstance(g, float) else FUNCTIONS[g], **options)


def literal(X: Tensor, g: float | str, root: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """W and X W of the damped filter from an SVD."""
    U, s, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    t = (s.square() + damping(cutoff) * root.double().square()).sqrt()
    values = (t / root.double()) ** g if isinstance(g, float) else FUNCTIONS[g](t)
    gains = values * (s / t).square()
    return (Vh.mT * gains) @ Vh, (U * (s * gains)) @ Vh


def formed(X: Tensor, found: FilterFactors) -> tuple[Tensor, Tensor]:
    """W and X W from the factors of one batch, on either side."""
    Y, K, R, E = (field[0].double() for field in found[:4])
    if len(X) <= X.shape[1]:
        return Y.mT @ R @ Y, K @ E @ Y
    return K @ R, Y.mT @ K @ E


@ALL
@pytest.mark.parametrize("spectrum_name", SPECTRA)
@pytest.mark.parametrize("shape", [(24, 64), (24, 24), (40, 24), (1, 5)], ids=str)
@pytest.mark.parametrize("cutoff", [CUTOFF, 0.1])
def test_only_the_weights_err_in_float64(
    cutoff: float, shape: tuple[int, int], spectrum_name: str, g: float | str
) -> None:
    X = with_spectrum(*shape, spectrum(spectrum_name, min(shape)))
    found = factors(X[None], g, cutoff=cutoff)
    assert int(found.status) == 0 and found.Y.dtype == torch.float64
    root = found.root[0]
    t = torch.tensor([damping(cutoff) ** 0.5, 1.0], dtype=torch.float64, device=DEVICE)
    largest = float((t**g if isinstance(g, float) else FUNCTIONS[g](root * t)).abs().max())
    for result, expected, size in zip(
        formed(X, found), literal(X, g, root, cutoff), (1.0, float(root)), strict=True
    ):
        error = torch.linalg.matrix_norm(result - expected, 2)
        assert error <= FIT * largest * size * (2 if isinstance(g, float) and g < 0 else 1)
    if g == 1.0:  # rows hardly err where the response does not amplify
        assert relative(formed(X, found)[1], literal(X, g, root, cutoff)[1]) <= 1e-5


def test_the_steps_lift_every_value_over_the_cutoff_to_one_and_none_over_it() -> None:
    """The first quintic is the steepest that leaves what it lifts in [0.7, 1]; the last two are
    nearest to 1, with errors of equal size at four points."""
    t = np.geomspace(CUTOFF, 1, 4000)
    numbers, x = lifted(t)
    assert numbers.shape == (4000, 4 * len(QUINTICS) - 3)
    assert x.min() >= 0.97 and x.max() <= 1.001
    once = [t * (a + b * t**2 + c * t**4) for a, b, c in QUINTICS]
    assert once[0].max() == pytest.approx(1, abs=1e-6)
    slope = QUINTICS[0][0]
    assert once[0][t >= 1 / slope].min() == pytest.approx(0.7, abs=1e-3)
    left = once[-2][t >= 0.7]
    for (a, b, c), low, high in ((QUINTICS[-2], 0.7, 1.0), (QUINTICS[-1], left.min(), left.max())):
        s = np.linspace(low, high, 4000)
        error = s * (a + b * s**2 + c * s**4) - 1
        size = np.abs(error).max()
        turns = np.flatnonzero(np.diff(np.sign(np.diff(np.abs(error)))) < 0) + 1
        peaks = [error[0], *error[turns], error[-1]]
        assert np.abs(peaks) == pytest.approx(size, rel=2e-2)
        assert len(peaks) == 4 and all(x * y < 0 for x, y in pairwise(peaks))


@ALL
@pytest.mark.parametrize("spectrum_name", ["flat", "k^-1/2", "k^-1", "k^-2", "clusters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float32_gradients_of_rows(dtype: torch.dtype, spectrum_name: str, g: float | str) -> None:
    """dP = dY W of a random dY has the direction that float64 gives it."""
    P, dY = (z.to(DEVICE) for z in spectra.two_views(64, 192, spectrum_name, dtype))
    found = factors(P[None], g)
    W, PW = formed(P, found)
    exact, rows = literal(P, g, found.root[0], CUTOFF)
    assert found.Y.dtype == torch.float32 and int(found.status) == 0
    for a, b in ((dY.double() @ W, dY.double() @ exact), (PW, rows)):
        assert float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) >= 0.9999


def test_views_of_a_batch_do_not_meet() -> None:
    views = [with_spectrum(12, 20, spectrum(n, 12), i) for i, n in enumerate(["flat", "k^-1"])]
    X = torch.stack([views[0], views[1] * 1e3])
    both = factors(X, "log_1")
    for i in range(2):
        alone = factors(X[i : i + 1], "log_1")
        for found, expected in zip(both, alone, strict=True):
            torch.testing.assert_close(found[i], expected[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("exponent", [-28, -12, 12, 28])
def test_a_scaled_batch_has_the_same_filter_in_float32(exponent: int) -> None:
    X = with_spectrum(12, 20, spectrum("k^-1", 12)).float()[None]
    plain, scaled = factors(X, 0.5), factors(X * 2.0**exponent, 0.5)
    assert int(scaled.status) == 0
    torch.testing.assert_close(scaled.root / 2.0**exponent, plain.root)
    for name, scale in (("Y", 1.0), ("K", 1.0), ("F", 1.0), ("E", 2.0**exponent)):
        assert relative(getattr(scaled, name) / scale, getattr(plain, name)) <= 1e-4


@pytest.mark.parametrize("noise", [1e-6, 0.05, 0.9])
@pytest.mark.parametrize("g", [0.5, "log_1"])
def test_noise_over_the_cutoff_is_the_damping(g: float | str, noise: float) -> None:
    X = with_spectrum(20, 40, spectrum("k^-1", 20))
    found = factors(X[None], g, noise=noise)
    tau = max(
        CUTOFF * float(torch.linalg.vector_norm(torch.linalg.svdvals(X), 8)), noise * X.norm()
    )
    assert math.sqrt(damping(CUTOFF)) * float(found.root) == pytest.approx(tau)
    assert int(found.status) == 0
    W, _ = literal(X, g, found.root[0], CUTOFF)
    largest = 1.0 if g == 0.5 else float(found.root.log1p())
    assert torch.linalg.matrix_norm(formed(X, found)[0] - W, 2) <= FIT * largest


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_view_that_is_not_finite_is_flagged_and_harms_no_other(bad: float) -> None:
    X = torch.stack([with_spectrum(8, 12, spectrum("flat", 8), i).float() for i in range(3)])
    clean = factors(X, 0.5)
    X[1, 2, 3] = bad
    found = factors(X, 0.5)
    assert found.status.tolist() == [0, NOT_FINITE, 0] and found.status.dtype == torch.int32
    for name in ("Y", "K", "F", "E"):
        field, expected = getattr(found, name), getattr(clean, name)
        assert field[1].isnan().all()
        assert torch.equal(field[0], expected[0]) and torch.equal(field[2], expected[2])


@pytest.mark.parametrize("spectrum_name", ["flat", "k^-1", "clusters", "k^-2", "rank 8"])
def test_products_rounded_to_tf32_are_flagged_where_they_harm(
    spectrum_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a product were one of 10-bit significands instead of three. Where the spectrum is
    steep, the steps diverge."""

    def tf32(x: Tensor) -> Tensor:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    def rounded(A: Tensor, B: Tensor | None = None, **options: Any) -> Symmetric:
        return sym_matmul(tf32(A), tf32(A if B is None else B), **options)

    X = with_spectrum(48, 96, spectrum(spectrum_name, 48)).float()[None]
    assert int(factors(X, "log_1").status) == 0
    module = sys.modules[filter_factors.__module__]
    monkeypatch.setattr(module, "sym_matmul", rounded)
    monkeypatch.setattr(module, "product", lambda A, B: product(tf32(A), tf32(B)))
    found = factors(X, "log_1")
    assert bool(found.status) == (not float(found.residual) <= residual_limit(CUTOFF))
    if spectrum_name in ("k^-2", "rank 8"):
        assert int(found.status) == INACCURATE
        assert not any(getattr(found, name).any() for name in ("Y", "K", "F", "E"))
    else:
        rows, exact = formed(X[0], found)[1], literal(X[0], "log_1", found.root[0], CUTOFF)[1]
        assert float(F.cosine_similarity(rows.flatten(), exact.flatten(), dim=0)) >= 0.995


@pytest.mark.parametrize("g", [0.5, 1.0, "log_1", "log_2"])
def test_zero_and_rank_one_are_finite(g: float | str) -> None:
    X = torch.stack([torch.zeros(6, 8, device=DEVICE), torch.ones(6, 8, device=DEVICE)])
    found = factors(X, g)
    assert found.status.tolist() == [0, 0]
    assert all(field.isfinite().all() for field in found)
    assert not found.Y[0].any() and not found.K[0].any()


def test_kernels_do_every_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA each op is its kernel: the same numbers, and no product of PyTorch's but the small
    float64 one of the weights."""
    X = with_spectrum(20, 30, spectrum("k^-1", 20)).float()[None]
    products: list[str] = []  # PyTorch's own, below float64

    def see(operator: Any, args: Any) -> None:
        named = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot"} & {*str(operator).split(".")}
        if named and args[0].dtype != torch.float64:
            products.extend(named)

    with Operators(see):
        X @ X.mT
    assert products == ["bmm"]
    expected = factors(X, "log_1")
    for op, name in (
        ("gram", "gram_op"),
        ("sym_matmul", "sym_matmul_op"),
        ("product", "product_op"),
    ):
        module = sys.modules[f"rdm_kernels.{op}"]  # the name in the package is the function
        monkeypatch.setattr(module, name, getattr(module, f"{op}_triton"))
    steps = sys.modules[filter_factors.__module__]
    for name in ("start", "combine"):
        launcher = getattr(sys.modules["rdm_kernels.filter_steps"], f"{name}_triton")
        monkeypatch.setattr(steps, name, launcher)
    with Operators(see):
        found = factors(X, "log_1")
    assert products == ["bmm"]
    for name in ("Y", "K", "F", "E"):
        assert relative(getattr(found, name), getattr(expected, name)) <= 1e-3
